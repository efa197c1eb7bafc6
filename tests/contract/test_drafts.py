"""The attention of draft models: every step of chains and trees, and what they take in, with SGLang's own tables."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import needs
import pytest
import torch

needs.sglang()

from contract.sglang_fixtures import DIM, HEADS, KV_HEADS, SCALE, MiniScheduler, make_runner
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from unit import fake_kernels

from flashcore_sglang import draft_backend, reference, sglang_hooks
from flashcore_sglang.backend import FlashCoreSparseBackend
from flashcore_sglang.facts import facts_of
from flashcore_sglang.gpu_attention import GpuStep
from flashcore_sglang.plugin import NAME, create_backend
from flashcore_sglang.requirements import draft_refusals
from flashcore_sglang.step import Drafts

pytestmark = pytest.mark.contract
STEPS, PROMPTS = 4, (300, 301, 30)
TOKENS = 8
"""Drafts that are verified, and taken in by the draft model, of each request."""


def draft_runner(branches: int, **options):
    runner = make_runner(slots=4096, context=512, is_draft_worker=True, **options)
    runner.server_args = SimpleNamespace(
        speculative_algorithm="EAGLE",
        enable_deterministic_inference=False,
        speculative_num_draft_tokens=TOKENS,
        speculative_eagle_topk=branches,
        speculative_num_steps=STEPS,
    )
    return runner


def factory_of(runner) -> SimpleNamespace:
    args = runner.server_args
    return SimpleNamespace(
        draft_model_runner=runner, topk=args.speculative_eagle_topk, speculative_num_steps=args.speculative_num_steps
    )


class Drafting:
    """Requests with random K and V, of which the first two share 296 tokens, and slots for drafts behind them."""

    def __init__(self, branches: int, page_size: int = 1, kernels: bool = False) -> None:
        self.runner = draft_runner(branches, page_size=page_size)
        self.pool, self.table = self.runner.token_to_kv_pool, self.runner.req_to_token_pool.req_to_token
        self.page_size, self.branches = page_size, branches
        self.generator = torch.Generator().manual_seed(0)
        self.backend = FlashCoreSparseBackend(self.runner)
        if kernels:
            self.backend._gpu = self.backend._make_gpu(self.runner)
        self.runner.attn_backend = self.backend
        self.steps = draft_backend.make_multi_step(factory_of(self.runner))
        for buffer in (self.pool.get_key_buffer(0), self.pool.get_value_buffer(0)):
            buffer.copy_(torch.randn(buffer.shape, generator=self.generator))
        pages = torch.randperm(self.pool.size // page_size, generator=self.generator) + 1
        slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten().int()
        width = self.table.shape[1] // page_size * page_size
        for row in range(1, len(PROMPTS) + 1):
            self.table[row, :width] = slots[(row - 1) * width : row * width]
        shared = 296 // page_size * page_size
        self.table[2, :shared] = self.table[1, :shared]
        self.rows, self.lens = torch.tensor([1, 2, 3]), torch.tensor(PROMPTS)

    def batch(self, padded: int = 0) -> SimpleNamespace:
        """A round of drafts as SGLang's worker prepares it; ``padded`` rows of its padding behind."""
        rows, lens = (torch.cat([x, x.new_full((padded,), y)]) for x, y in ((self.rows, 0), (self.lens, 1)))
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(rows),
            req_pool_indices=rows,
            seq_lens=lens,
            positions=lens.repeat_interleave(self.branches),
            out_cache_loc_is_physical=True,
            spec_info=None,
        )

    def slots_of(self, step: int) -> list[torch.Tensor]:
        """What each branch sees in a step, by SGLang's formula (``generate_draft_decode_kv_indices``)."""
        seen, page = [], self.page_size
        for row, length in zip(self.rows.tolist(), self.lens.tolist(), strict=True):
            tail = length % page
            size = -(-(tail + STEPS) // page) * page
            for branch in range(self.branches):
                if page == 1 or self.branches == 1:
                    first = length + branch * STEPS
                else:
                    first = length - tail + branch * size + tail
                own = self.table[row, first : first + step + 1]
                seen.append(torch.cat([self.table[row, :length], own]).long())
        return seen

    def copy_tails(self) -> None:
        """As ``duplicate_prefix_tail_to_draft_branches``: branches that begin on a page begin with the last tokens."""
        for row, length in zip(self.rows.tolist(), self.lens.tolist(), strict=True):
            tail = length % self.page_size
            size = -(-(tail + STEPS) // self.page_size) * self.page_size
            for branch in range(1, self.branches):
                at = length - tail + branch * size
                for buffer in (self.pool.get_key_buffer(0), self.pool.get_value_buffer(0)):
                    buffer[self.table[row, at : at + tail].long()] = buffer[
                        self.table[row, length - tail : length].long()
                    ]

    def check_step(self, step: int, batch: SimpleNamespace) -> None:
        """Attention of a step, which also writes its K and V, equals the definition; padded rows only run."""
        seen = self.slots_of(step)
        padding = batch.batch_size * self.branches - len(seen)
        batch.out_cache_loc = torch.cat([torch.stack([x[-1] for x in seen]), torch.zeros(padding, dtype=torch.int64)])
        tokens = len(batch.out_cache_loc)
        q, k, v = (torch.randn(tokens, h, DIM, generator=self.generator) for h in (HEADS, KV_HEADS, KV_HEADS))
        got = self.steps.attn_backends[step].forward(q.flatten(1), k, v, self.runner.model[0], batch)
        for i, slots in enumerate(seen):
            assert torch.equal(self.pool.get_key_buffer(0)[slots[-1]], k[i])
            keys, values = self.pool.get_key_buffer(0)[slots], self.pool.get_value_buffer(0)[slots]
            visible = torch.ones(1, len(slots), dtype=torch.bool)
            want = reference.attention(q[i : i + 1], keys, values, visible=visible, scale=SCALE)[0]
            torch.testing.assert_close(got[i].double(), want.flatten(), atol=1e-5, rtol=1e-5)

    def round(self, padded: int = 0) -> None:
        if self.page_size > 1 and self.branches > 1:
            self.copy_tails()
        batch = self.batch(padded)
        self.steps.init_forward_metadata(batch)
        for step in range(STEPS - 1):
            self.check_step(step, batch)


SHAPES = [(1, 1), (3, 1), (1, 16), (3, 16), (3, 64)]


@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "tables of a GPU"])
@pytest.mark.parametrize(("branches", "page_size"), SHAPES)
def test_every_step_equals_the_definition(branches, page_size, kernels, padded, monkeypatch):
    if kernels:
        fake_kernels.install(monkeypatch)
    drafting = Drafting(branches, page_size, kernels)
    drafting.round(padded)
    assert kernels == isinstance(drafting.steps.attn_backends[0].forward_metadata, GpuStep)
    drafting.lens += torch.tensor([1, STEPS, 2])  # what was accepted
    drafting.round(padded)


def test_the_branches_of_requests_that_share_read_it_once():
    drafting = Drafting(3)
    drafting.steps.init_forward_metadata(drafting.batch())
    layout = drafting.steps.attn_backends[2].forward_metadata.layout
    six = layout.segment_rows[:, 1] - layout.segment_rows[:, 0] == 6
    assert layout.segment_positions[six].tolist() == [[0, 296]]


def test_steps_are_planned_one_after_the_other(monkeypatch):
    """And again where the round is run a second time, as the warm-ups of a capture do."""
    fake_kernels.install(monkeypatch)
    drafting = Drafting(2, kernels=True)
    batch = drafting.batch()
    drafting.steps.init_cuda_graph_state(8, 16)
    drafting.steps.init_forward_metadata_out_graph(batch, in_capture=True)
    drafting.table.fill_(7)  # the graph reads its snapshot
    planned = []
    for _ in range(2):
        drafting.steps.init_forward_metadata_in_graph(batch)
        for backend in drafting.steps.attn_backends:
            q = torch.zeros(6, HEADS * DIM)
            for _ in range(2):  # layers
                backend.forward(q, None, None, drafting.runner.model[0], batch)
            planned.append([len(x) for x in drafting.backend._gpu.full.planned.slots])
    step = [301, 301, 302, 302, 31, 31]
    assert planned == 2 * [[n + i for n in step] for i in range(STEPS - 1)]


@pytest.mark.parametrize(("branches", "page_size"), SHAPES)
def test_tables_of_drafts_are_those_of_sglangs_kernel(branches, page_size):
    """Interpreted. It reads the request's last tokens where they are, and not the copy before each branch."""
    triton = pytest.importorskip("triton")
    from sglang.kernels.ops.speculative.cache_locs import generate_draft_decode_kv_indices

    drafting = Drafting(branches, page_size)
    batch = drafting.batch()
    drafts = Drafts(batch.req_pool_indices, batch.seq_lens, branches, STEPS)
    table, rows = drafts.table(drafting.table, page_size)
    indices = torch.zeros(STEPS, 8192, dtype=torch.int64)
    indptr = torch.zeros(STEPS, drafts.num_rows + 1, dtype=torch.int32)
    upper = [triton.next_power_of_2(n) for n in (len(PROMPTS), STEPS, drafts.num_rows)]
    generate_draft_decode_kv_indices[(STEPS, len(PROMPTS), branches)](
        batch.req_pool_indices, drafting.table, batch.seq_lens, indices, indptr, batch.positions,
        drafting.table.shape[1], indices.shape[1], indptr.shape[1], *upper, page_size,
    )  # fmt: skip
    for step, lens in enumerate(drafts.lens()):
        for row in range(drafts.num_rows):
            wanted, length = indices[step, indptr[step, row] : indptr[step, row + 1]], PROMPTS[row // branches]
            got = table[rows[row], : lens[row]].long()
            if row % branches:
                copied = slice(length // page_size * page_size, length)
                assert not set(got[copied].tolist()) & set(wanted.tolist())
                got[copied] = wanted[copied]
            assert torch.equal(got, wanted)


class TakingIn:
    """A draft model that takes in ``TOKENS`` tokens of each request, as one of SGLang's replays gives them."""

    def __init__(self) -> None:
        self.runner = draft_runner(2)
        self.scheduler = MiniScheduler(self.runner, torch.Generator().manual_seed(0))
        self.backend = FlashCoreSparseBackend(self.runner)
        self.backend._gpu = self.backend._make_gpu(self.runner)
        self.rows = [self.scheduler.add(list(range(n)))[0] for n in PROMPTS]
        for name in ("get_key_buffer", "get_value_buffer"):
            buffer = getattr(self.scheduler.pool, name)(0)
            buffer.copy_(self.scheduler.random(*buffer.shape))

    def view(self, size: int, in_capture: bool) -> SimpleNamespace:
        """Of static buffers for 8 requests; padded rows have one token, fewer than their new ones."""
        rows, lens = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)
        rows[:3], lens[:3] = torch.tensor(self.rows), torch.tensor(PROMPTS)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DRAFT_EXTEND_V2,
            batch_size=size,
            req_pool_indices=rows[:size] if in_capture else rows,
            seq_lens=lens[:size] if in_capture else lens,
            out_cache_loc=torch.cat(
                [self.scheduler.table[r, n - TOKENS : n] for r, n in zip(self.rows, PROMPTS, strict=True)]
            ).long(),
            out_cache_loc_is_physical=True,
            spec_info=SimpleNamespace(num_tokens_per_req=TOKENS),
        )
        if in_capture:
            batch.extend_seq_lens_cpu = [TOKENS] * size
        return batch


@pytest.mark.parametrize("in_capture", [True, False], ids=["capture", "replay"])
@pytest.mark.parametrize("size", [3, 5])
def test_verified_tokens_are_taken_in_with_fixed_buffers(size, in_capture, monkeypatch):
    fake_kernels.install(monkeypatch)
    taking = TakingIn()
    batch = taking.view(size, in_capture)
    taking.backend.init_cuda_graph_state(8, 8 * TOKENS)
    assert taking.backend._gpu._mask is None
    taking.backend.init_forward_metadata_out_graph(batch, in_capture=in_capture)
    taking.backend.init_forward_metadata_in_graph(batch)
    q = taking.scheduler.random(size * TOKENS, HEADS, DIM)
    got = taking.backend.forward(q.flatten(1), None, None, taking.runner.model[0], batch)
    want = reference.extend(
        q[: 3 * TOKENS],
        taking.scheduler.pool.get_key_buffer(0),
        taking.scheduler.pool.get_value_buffer(0),
        taking.scheduler.table,
        torch.tensor(taking.rows),
        torch.tensor(PROMPTS),
        torch.full((3,), TOKENS),
        page_size=1,
        scale=SCALE,
    )
    torch.testing.assert_close(got[: 3 * TOKENS].double(), want.flatten(1), atol=1e-5, rtol=1e-5)


@pytest.fixture
def sglangs_factory(monkeypatch):
    """SGLang's own, as its worker makes it for a draft model of a server that runs ours."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.speculative import draft_utils

    load_plugins()
    # 0.5.23 asks the process for the names that it has decided on.
    monkeypatch.setattr(draft_utils, "attention_backends", lambda: (NAME, NAME), raising=False)

    def make(runner):
        args, runner.draft_attention_backend = runner.server_args, None
        args.speculative_draft_attention_backend, args.speculative_attention_mode = None, "prefill"
        args.decode_attention_backend = args.prefill_attention_backend = args.attention_backend = NAME
        runner.model_config.hf_config = runner.model_config.hf_text_config = SimpleNamespace(architectures=[])
        given = {"server_args": args, "draft_model_runner": runner, "topk": 2, "speculative_num_steps": STEPS}
        taken = inspect.signature(draft_utils.DraftBackendFactory).parameters
        return draft_utils.DraftBackendFactory(**{name: x for name, x in given.items() if name in taken})

    if hasattr(draft_utils, "get_spec"):
        monkeypatch.setattr(draft_utils, "get_spec", lambda: SimpleNamespace(speculative_attention_mode="prefill"))
    return make


def test_sglangs_factory_makes_ours(sglangs_factory, caplog):
    runner = draft_runner(2)
    factory = sglangs_factory(runner)
    steps, extend = factory.create_decode_backend(), factory.create_draft_extend_backend()
    assert isinstance(steps, draft_backend.MultiStepDraftBackend) and len(steps.attn_backends) == STEPS - 1
    assert isinstance(extend, FlashCoreSparseBackend)
    assert "flashcore_sparse serves the steps of the draft model" in caplog.text
    assert "flashcore_sparse serves the extends of the draft model" in caplog.text
    worker = importlib.import_module("sglang.srt.speculative.eagle_worker_v2").EagleDraftWorker
    assert hasattr(worker._capture_cuda_graphs, "__wrapped__"), "hooked, as its extends are to be captured"


def test_a_backend_before_another_for_prefill_knows_the_context_length(sglangs_factory):
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    runner = draft_runner(2)
    sglangs_factory(runner).create_decode_backend()
    hybrid = HybridAttnBackend.__new__(HybridAttnBackend)
    hybrid.decode_backend = FlashCoreSparseBackend(runner)
    assert hybrid.max_context_len == runner.model_config.context_len  # eagle_worker_common asks for it


def test_sglangs_factory_makes_fa3_for_what_is_not_served(sglangs_factory, caplog, monkeypatch):
    runner = draft_runner(2)
    runner.model[0].sliding_window_size = 100
    factory = sglangs_factory(runner)
    made = SimpleNamespace(attn_backends=[])

    def _create_fa3_decode_backend():
        return ("fa3", made) if "stamps_children" in inspect.signature(factory._create_backend).parameters else made

    monkeypatch.setattr(factory, "_create_fa3_decode_backend", _create_fa3_decode_backend)
    assert factory.create_decode_backend() is made
    assert "flashcore_sparse: fa3 serves the steps of the draft model: draft model: want layers" in caplog.text


def test_extends_are_captured_where_sglang_lists_its_backends(monkeypatch):
    from sglang.srt.speculative import eagle_worker_v2

    listed = eagle_worker_v2.TritonAttnBackend
    backend = FlashCoreSparseBackend(draft_runner(2))
    seen = []

    def original(worker):
        seen.append(isinstance(worker.backend, (eagle_worker_v2.TritonAttnBackend, int)))

    sglang_hooks.capture_draft_graphs(original, SimpleNamespace(backend=backend))
    assert seen == [True] and eagle_worker_v2.TritonAttnBackend is listed


def test_steps_and_extends_share_a_backend(monkeypatch):
    runner = draft_runner(2)
    runner.attn_backend = FlashCoreSparseBackend(runner)
    assert draft_backend.make_extend(factory_of(runner)) is runner.attn_backend
    assert draft_backend.make_multi_step(factory_of(runner))._backend is runner.attn_backend
    runner.attn_backend = SimpleNamespace(decode_backend=runner.attn_backend)  # beside another one for prefill
    assert draft_backend.make_multi_step(factory_of(runner))._backend is runner.attn_backend.decode_backend
    runner.server_args.speculative_num_draft_tokens += 1  # of an engine that changes its mind
    factory = factory_of(runner)
    extend = draft_backend.make_extend(factory)
    assert extend is not runner.attn_backend.decode_backend
    assert draft_backend.make_multi_step(factory)._backend is extend


def test_more_branches_than_there_is_room_for_are_refused(monkeypatch):
    fake_kernels.install(monkeypatch)
    drafting = Drafting(2, kernels=True)
    drafting.backend._gpu.max_rows = 5
    with pytest.raises(ValueError, match="want at most 5 branches of 4 drafts, got 6 of 4"):
        drafting.steps.init_forward_metadata(drafting.batch())


def test_wrong_tables_of_earlier_steps_are_reported(monkeypatch, caplog):
    fake_kernels.install(monkeypatch)
    drafting = Drafting(2, kernels=True)
    found = [None, (1, 3, 16, -7)]
    monkeypatch.setattr(drafting.backend._gpu, "violation", found.pop)
    drafting.steps.init_forward_metadata(drafting.batch())
    assert found == [None] and "req_to_token" in caplog.text and "-7" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable_multi_layer_eagle": True}, "want one, got 4 layers with a pool each"),
        ({}, "want layers that read everything, got windows or chunks"),
    ],
)
def test_what_is_not_served_is_delegated(change, words):
    runner = draft_runner(2)
    vars(runner.server_args).update(change)
    if not change:
        runner.model[0].sliding_window_size = 100
    assert words in "".join(draft_backend.reasons_to_delegate(runner, "steps"))
    assert not draft_refusals(facts_of(draft_runner(2)))


def test_prompts_stay_with_the_backend_for_prefill():
    runner = draft_runner(2)
    runner.server_args.prefill_attention_backend = "fa3"
    assert "got another backend for prompts" in draft_backend.reasons_to_delegate(runner, "extends")[0]
    assert not draft_backend.reasons_to_delegate(runner, "steps")


@pytest.mark.parametrize("served", [True, False])
def test_registry_makes_the_backend_that_serves_the_draft_model(served, monkeypatch, caplog):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    runner = draft_runner(2)
    if not served:
        runner.model[0].logit_cap, runner.model[0].logit_capping_method = 30.0, "sigmoid"
    monkeypatch.setitem(ATTENTION_BACKENDS, "fa3", lambda runner: "fa3's")
    made = create_backend(runner)
    assert isinstance(made, FlashCoreSparseBackend) if served else made == "fa3's"
    assert ("fa3 serves the rest of the draft model: model: want logits capped by tanh" in caplog.text) != served
