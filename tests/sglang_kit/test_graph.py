"""Decode in CUDA graphs: SGLang's runner of the kit, and real captures whose tables change between replays."""

from __future__ import annotations

import unittest
from types import SimpleNamespace

import pytest
import torch
from sglang_kit.kit import HOPPER, OPTIONS, buffers, build, case, kit, prepare, share_prefixes, used_slots

if not HOPPER:
    pytest.skip("no Hopper GPU", allow_module_level=True)

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as runner_kit
from sglang.test.kits.attention_unittest.runner_modes import split_op_runner as split_kit

from flashcore_sglang.plugin import NAME

pytestmark = [pytest.mark.contract, pytest.mark.gpu]
DENSE = kit.make_dense_cases("flashcore_sparse")


@pytest.fixture(autouse=True)
def _prepared(monkeypatch):
    prepare(monkeypatch)


@pytest.mark.parametrize("dense", [c for c in DENSE if c.forward_mode.is_decode()], ids=lambda c: c.name)
@pytest.mark.parametrize("padded_to", [4, 7])
def test_kit_replays_decode(dense, padded_to):
    runner_kit.run_dense_cuda_graph_decode_case(
        unittest.TestCase(), dense, cuda_graph_capture_batch_size=padded_to, **OPTIONS
    )


@pytest.mark.parametrize("window", [1, 100, 300])
@pytest.mark.parametrize("page_size", [1, 16])
def test_kit_replays_decode_with_a_window(page_size, window):
    windowed = case("window", [150, 3, 400], page_size=page_size, window=window)
    runner_kit.run_dense_cuda_graph_decode_case(
        unittest.TestCase(), windowed, cuda_graph_capture_batch_size=4, **OPTIONS
    )


@pytest.mark.parametrize("dense", [c for c in DENSE if not c.forward_mode.is_decode()], ids=lambda c: c.name)
def test_kit_runs_extend_between_captured_segments(dense):
    # The kit writes the prefix a second time, at the slots of its contiguous layout; at other context lengths some of
    # them are slots of its shuffled one.
    options = {**OPTIONS, "max_context_len": 512}
    tokens = dense.num_input_tokens
    split_kit.run_dense_split_op_extend_case(
        unittest.TestCase(), dense, breakable=True, static_num_tokens=tokens + 3, **options
    )


class Captured:
    """One graph of ``size`` decode rows over a fixture of the kit; its inputs are static, as SGLang's."""

    def __init__(self, fixture: kit.DenseAttentionFixture, size: int, backend=None) -> None:
        self.fixture, self.size = fixture, size
        self.backend = backend or fixture.backend
        self.hidden = torch.randn(size, 64, dtype=torch.bfloat16, device="cuda")
        self.view = self._make_view(size)
        self.backend.init_cuda_graph_state(size, size)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.backend)):
            self.backend.init_forward_metadata_out_graph(self.view, in_capture=True)
            self._forward()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.backend.init_forward_metadata_in_graph(self.view)
                self.out = self._forward()

    def _make_view(self, size: int) -> SimpleNamespace:
        ints = {"dtype": torch.int64, "device": "cuda"}
        return SimpleNamespace(
            batch_size=size,
            forward_mode=ForwardMode.DECODE,
            actual_forward_mode=ForwardMode.DECODE,
            input_ids=torch.zeros(size, **ints),
            positions=torch.zeros(size, **ints),
            req_pool_indices=torch.zeros(size, **ints),
            seq_lens=torch.ones(size, **ints),
            seq_lens_sum=None,
            seq_lens_cpu=None,
            encoder_lens=None,
            out_cache_loc=torch.zeros(size, **ints),
            spec_info=None,
        )

    def _forward(self) -> torch.Tensor:
        return self.fixture.actual_module(self.hidden, self.view)

    def load(self) -> None:
        """The fixture's batch into the static inputs, padded with SGLang's padding row, and the step's snapshot."""
        batch = self.fixture.forward_batch
        rows = batch.batch_size
        for name, fill in (("req_pool_indices", 0), ("seq_lens", 1), ("out_cache_loc", 0)):
            static = getattr(self.view, name)
            static.fill_(fill)
            static[:rows] = getattr(batch, name)
        self.hidden[:rows] = self.fixture.input_hidden
        self.backend.init_forward_metadata_out_graph(self.view)

    def replay(self) -> torch.Tensor:
        self.out.fill_(torch.nan)
        self.graph.replay()
        return self.out[: self.fixture.forward_batch.batch_size]


class CapturedHalves(Captured):
    """The same by SGLang's backend for two-batch overlap: ours for each half, and a third one for the whole."""

    def _make_view(self, size: int) -> SimpleNamespace:
        view = super()._make_view(size)
        view.seq_lens_cpu, view.max_seq_len_override = torch.ones(size, dtype=torch.int64), None
        self.parts = slice(0, size // 2), slice(size // 2, size)
        view.tbo_children = self.halves = [
            SimpleNamespace(
                **{k: v[part] if isinstance(v, torch.Tensor) else v for k, v in vars(view).items()}
                | {"batch_size": size // 2}
            )
            for part in self.parts
        ]
        return view

    def _forward(self) -> torch.Tensor:
        halves = []
        for backend, view, part in zip(self.backend.children, self.halves, self.parts, strict=True):
            with forward_context(ForwardContext(attn_backend=backend)):
                halves.append(self.fixture.actual_module(self.hidden[part], view))
        return torch.cat(halves)

    def load(self) -> None:
        self.view.tbo_children = None  # SGLang's views of a replay have none, and are cut anew
        super().load()


def lifted(lens: list[int], size: int | None = None) -> kit.DenseAttentionFixture:
    """A decode fixture whose requests have rows 1, 2, ...: row 0 is SGLang's padding row. ``size``: of the graph."""
    fixture = build(case("graph", lens), runner_batch_size=(size or len(lens)) + 1)
    table = fixture.runner.req_to_token_pool.req_to_token
    table[1 : len(lens) + 1] = table[: len(lens)].clone()
    table[0] = 0
    fixture.forward_batch.req_pool_indices = torch.arange(1, len(lens) + 1, device="cuda")
    for buffer in buffers(fixture):
        buffer[0] = 0
    return fixture


def move_slots(fixture: kit.DenseAttentionFixture) -> None:
    """Every slot's token moves to a slot that another token had, and the tables follow."""
    used = used_slots(fixture)
    moved = torch.arange(len(buffers(fixture)[0]), device="cuda")
    moved[used] = used[torch.randperm(len(used), device="cuda")]
    for buffer in buffers(fixture):
        buffer[moved[used]] = buffer[used].clone()
    table, batch = fixture.runner.req_to_token_pool.req_to_token, fixture.forward_batch
    table.copy_(moved[table.long()])
    batch.out_cache_loc = moved[batch.out_cache_loc]


def expect(fixture: kit.DenseAttentionFixture, actual: torch.Tensor) -> None:
    expected = kit.expected_dense_fixture_output(fixture)
    torch.testing.assert_close(actual, expected, atol=kit.DENSE_ATOL, rtol=kit.DENSE_RTOL)


@pytest.mark.parametrize("size", [5, 8])
def test_replays_follow_groups_that_change(size):
    fixture = lifted([600, 600, 600, 600, 90], size)
    captured = Captured(fixture, size)
    for groups in ([], [([0, 1], 256)], [([0, 1, 2, 3], 256)], [([2, 3], 512)], [([0, 1, 2, 3], 600)]):
        share_prefixes(fixture, groups)
        captured.load()
        expect(fixture, captured.replay())


@pytest.mark.parametrize("size", [6, 8])
def test_replays_in_two_halves(size):
    fixture = lifted([600, 600, 600, 600, 90], size)
    backend = TboAttnBackend.init_new(lambda: ATTENTION_BACKENDS[NAME](fixture.runner))
    captured = CapturedHalves(fixture, size, backend)
    for groups in ([], [([0, 1, 2, 3], 256)], [([2, 3], 512)]):
        share_prefixes(fixture, groups)
        captured.load()
        expect(fixture, captured.replay())


def test_rows_rewritten_after_the_snapshot_do_not_reach_the_replay():
    """SGLang's scheduler may rewrite rows once the step's metadata is made (overlap scheduling)."""
    fixture = lifted([600, 600, 600, 90])
    share_prefixes(fixture, [([0, 1, 2], 512)])
    captured = Captured(fixture, 4)
    captured.load()
    fixture.runner.req_to_token_pool.req_to_token.fill_(7)
    expect(fixture, captured.replay())


def test_slots_that_were_freed_and_given_to_others():
    fixture = lifted([300, 300, 300, 20])
    share_prefixes(fixture, [([0, 1, 2], 256)])
    captured = Captured(fixture, 4)
    for _ in range(3):
        captured.load()
        expect(fixture, captured.replay())
        move_slots(fixture)


def test_decode_beside_fa3():
    """Shape ``--attention-backend fa3 --decode-attention-backend flashcore_sparse``."""
    fixture = lifted([600, 600, 90])
    share_prefixes(fixture, [([0, 1], 512)])
    fixture.runner.server_args.speculative_attention_mode = "prefill"
    both = HybridAttnBackend(fixture.runner, ATTENTION_BACKENDS["fa3"](fixture.runner), fixture.backend)
    captured = Captured(fixture, 4, both)
    captured.load()
    expect(fixture, captured.replay())


def test_idle_rank_has_nothing_to_do():
    fixture = lifted([20])
    fixture.forward_batch.forward_mode = ForwardMode.IDLE
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    q = torch.empty(0, 8 * 128, dtype=torch.bfloat16, device="cuda")
    got = fixture.backend.forward(q, q[:, :256], q[:, :256], fixture.actual_module.attn, fixture.forward_batch)
    assert got.shape == (0, 8 * 128)
