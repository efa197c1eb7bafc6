"""The verification of drafts: a chain and a tree, in PyTorch and with the tables that the kernels get."""

from __future__ import annotations

from types import SimpleNamespace

import needs
import pytest
import torch

needs.sglang()

from contract.sglang_fixtures import DIM, HEADS, KV_HEADS, SCALE, MiniScheduler, make_runner
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from unit import fake_kernels

from flashcore_sglang import reference
from flashcore_sglang.backend import FlashCoreSparseBackend
from flashcore_sglang.gpu_attention import GpuStep

pytestmark = pytest.mark.contract
DRAFTS, PROMPTS = 4, (300, 301, 30)


class Verifying:
    """Requests with ``DRAFTS`` slots behind their tokens; the first two share 299 tokens."""

    def __init__(self, branches: int, window: int = -1) -> None:
        self.runner = make_runner(slots=2048, context=512)
        self.runner.model[0].sliding_window_size = self.window = window
        args = self.runner.server_args
        args.speculative_algorithm, args.speculative_num_draft_tokens = "EAGLE", DRAFTS
        args.speculative_eagle_topk, self.branches = branches, branches
        self.scheduler = MiniScheduler(self.runner, torch.Generator().manual_seed(0))
        self.backend = FlashCoreSparseBackend(self.runner)
        self.rows = []
        for i, length in enumerate(PROMPTS):
            row, cached = self.scheduler.add([*range(length - 1), 1000 + i] if i < 2 else [7] * length)
            q_len = length - cached
            batch = self.scheduler.batch([row], [q_len])
            self.backend.init_forward_metadata(batch)
            self.forward(batch, q_len)
            self.scheduler.publish(row)
            self.rows.append(row)

    def forward(self, batch, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (self.scheduler.random(tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        out = self.backend.forward(q.flatten(1), k, v, self.runner.model[0], batch)
        return q, out.view(tokens, HEADS, DIM)

    def batch(self) -> SimpleNamespace:
        lens = torch.tensor(PROMPTS)
        slots = self.scheduler.alloc(DRAFTS * len(self.rows)).view(-1, DRAFTS)
        for row, length, of_row in zip(self.rows, PROMPTS, slots, strict=True):
            self.scheduler.table[row, length : length + DRAFTS] = of_row.to(torch.int32)
        self.mask = self.tree_mask() if self.branches > 1 else torch.ones(0, dtype=torch.bool)
        return SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(self.rows),
            req_pool_indices=torch.tensor(self.rows),
            seq_lens=lens,
            extend_seq_lens=None,
            out_cache_loc=slots.flatten(),
            out_cache_loc_is_physical=True,
            spec_info=SimpleNamespace(draft_token_num=DRAFTS, topk=self.branches, custom_mask=self.mask),
        )

    def tree_mask(self) -> torch.Tensor:
        """Two branches of two drafts."""
        drafts = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
        return torch.cat([torch.cat([torch.ones(DRAFTS, n).bool(), drafts], 1).flatten() for n in PROMPTS])

    def check(self) -> None:
        batch = self.batch()
        self.backend.init_forward_metadata(batch)
        q, got = self.forward(batch, DRAFTS * len(self.rows))
        want = reference.extend(
            q,
            self.scheduler.pool.get_key_buffer(0).nan_to_num(0.0),
            self.scheduler.pool.get_value_buffer(0).nan_to_num(0.0),
            self.scheduler.table,
            batch.req_pool_indices,
            batch.seq_lens + DRAFTS,
            torch.full((len(self.rows),), DRAFTS),
            page_size=1,
            scale=SCALE,
            window_left=self.window,
            custom_mask=self.mask if self.branches > 1 else None,
        )
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branches", [1, 2], ids=["chain", "tree"])
def test_verification_equals_the_definition(branches):
    verifying = Verifying(branches)
    verifying.check()
    shared = verifying.backend.forward_metadata.layout
    assert shared.segment_positions[0].tolist() == [0, 299], "the common prefix is read once"


@pytest.mark.parametrize("captured", [0, 4, 1], ids=["eager", "static mask", "more rows than the static mask has"])
@pytest.mark.parametrize("window", [-1, 0, 2, 50])
@pytest.mark.parametrize("branches", [1, 2], ids=["chain", "tree"])
def test_kernels_get_the_tables_and_the_mask(branches, window, captured, monkeypatch):
    fake_kernels.install(monkeypatch)
    verifying = Verifying(branches, window)
    backend = verifying.backend
    backend._gpu = backend._make_gpu(verifying.runner)
    if captured:
        backend.init_cuda_graph_state(captured, captured * DRAFTS)
    verifying.check()
    assert isinstance(backend.forward_metadata, GpuStep)
    verifying.check()  # other slots, the same memory


@pytest.mark.parametrize("window", [2, 50])
def test_tree_with_a_window_equals_the_definition(window):
    Verifying(2, window).check()


def test_mask_that_comes_after_the_plan_is_taken(monkeypatch):
    fake_kernels.install(monkeypatch)
    verifying = Verifying(2)
    backend = verifying.backend
    backend._gpu = backend._make_gpu(verifying.runner)
    backend.init_cuda_graph_state(4, 4 * DRAFTS)
    backend.init_forward_metadata_out_graph(verifying.batch())
    backend.update_verify_buffers_to_fill_after_draft(SimpleNamespace(custom_mask=~verifying.mask), None)
    static = backend._gpu._mask
    assert torch.equal(static[: len(verifying.mask)], ~verifying.mask)


def test_another_number_of_drafts_than_at_the_start_is_refused(monkeypatch):
    fake_kernels.install(monkeypatch)
    verifying = Verifying(1)
    backend = verifying.backend
    backend._gpu = backend._make_gpu(verifying.runner)
    batch = verifying.batch()
    batch.spec_info.draft_token_num = DRAFTS + 1
    with pytest.raises(ValueError, match=f"want {DRAFTS} drafts for every request, as at the start, got {DRAFTS + 1}"):
        backend.init_forward_metadata(batch)


def test_ragged_verification_is_refused():
    verifying = Verifying(1)
    batch = verifying.batch()
    batch.spec_info.ragged_verify_layout = object()
    with pytest.raises(ValueError, match="want as many drafts for every request, got a ragged layout"):
        verifying.backend.init_forward_metadata(batch)


def test_draft_extend_is_an_extend():
    """Its lengths count the new tokens, unlike those of a verification."""
    verifying = Verifying(1)
    batch = verifying.batch()
    batch.forward_mode = ForwardMode.DRAFT_EXTEND_V2
    batch.seq_lens = batch.seq_lens + DRAFTS
    batch.extend_seq_lens = torch.full((len(PROMPTS),), DRAFTS)
    verifying.backend.init_forward_metadata(batch)
    assert verifying.backend.forward_metadata.num_tokens == DRAFTS * len(PROMPTS)
