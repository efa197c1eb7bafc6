"""Two-batch overlap: SGLang splits a batch among two backends of ours beside a third one for what is not split."""

from __future__ import annotations

from types import SimpleNamespace

import needs
import pytest
import torch

needs.sglang()

from contract.sglang_fixtures import DIM, HEADS, KV_HEADS, SCALE, MiniScheduler, make_runner
from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from unit import fake_kernels

from flashcore_sglang import reference
from flashcore_sglang.backend import FlashCoreSparseBackend
from flashcore_sglang.gpu_attention import GpuStep

pytestmark = pytest.mark.contract
SHARED = 300


class Overlapping:
    """Five requests of 40 tokens, four of them behind ``SHARED`` common ones, on SGLang's backend for two halves."""

    def __init__(self, kernels: bool, monkeypatch: pytest.MonkeyPatch, attention_ranks: int = 1) -> None:
        settings = SimpleNamespace(
            device="cpu", moe_dense_tp_size=None, attention_backend="torch_native", attn_tp_size=attention_ranks
        )
        for name in ("get_server_args", "get_device", "get_parallel"):
            monkeypatch.setattr(two_batch_overlap, name, lambda: settings, raising=False)
        backends = ("torch_native", "torch_native")  # of 0.5.23
        monkeypatch.setattr(two_batch_overlap, "attention_backends", lambda: backends, raising=False)
        self.runner = make_runner(slots=4096, context=1024, max_requests=5)
        self.scheduler = MiniScheduler(self.runner, torch.Generator().manual_seed(0))
        if kernels:
            fake_kernels.install(monkeypatch)
        self.backend = TboAttnBackend.init_new(lambda: self.make(kernels))
        fill_value = self.backend.get_cuda_graph_seq_len_fill_value
        self.runner.attn_backend = SimpleNamespace(
            get_cuda_graph_seq_len_fill_value=fill_value,
            get_cpu_graph_seq_len_fill_value=fill_value,  # 0.5.23 on a CPU, where no backend but SGLang's own has it
        )
        tokens = [*[[*range(SHARED), *[1000 + i] * 40] for i in range(4)], [7] * 40]
        self.rows = []
        for x in tokens:
            row, _ = self.scheduler.add(x)
            self.write(row)
            self.scheduler.publish(row)
            self.rows.append(row)

    def make(self, kernels: bool) -> FlashCoreSparseBackend:
        backend = FlashCoreSparseBackend(self.runner)
        if kernels:
            backend._gpu = backend._make_gpu(self.runner)
        return backend

    def write(self, row: int) -> None:
        """K and V of a request's tokens."""
        slots = self.scheduler.table[row, : len(self.scheduler.tokens[row])].long()
        for cache in (self.scheduler.pool.get_key_buffer(0), self.scheduler.pool.get_value_buffer(0)):
            cache[slots] = self.scheduler.random(len(slots), KV_HEADS, DIM)

    def batch(self, rows: list[int], q_lens: list[int] | None) -> ForwardBatch:
        fake = self.scheduler.batch(rows, q_lens)
        tokens = len(fake.out_cache_loc)
        batch = ForwardBatch(
            forward_mode=fake.forward_mode,
            batch_size=len(rows),
            input_ids=torch.zeros(tokens, dtype=torch.int64),
            req_pool_indices=fake.req_pool_indices,
            seq_lens=fake.seq_lens,
            out_cache_loc=fake.out_cache_loc,
            seq_lens_sum=int(fake.seq_lens.sum()),
            seq_lens_cpu=fake.seq_lens.clone(),
            positions=torch.zeros(tokens, dtype=torch.int64),
        )
        if q_lens is not None:
            batch.extend_num_tokens, batch.extend_seq_lens_cpu = tokens, list(q_lens)
            batch.extend_seq_lens, batch.extend_prefix_lens = fake.extend_seq_lens, fake.extend_prefix_lens
            batch.extend_prefix_lens_cpu = fake.extend_prefix_lens.tolist()
            batch.extend_start_loc = torch.tensor([0, *q_lens[:-1]]).cumsum(0)
        return batch

    def split(self, batch: ForwardBatch) -> None:
        mode, lens = batch.forward_mode, batch.extend_seq_lens_cpu
        per_seq = two_batch_overlap.get_token_num_per_seq(mode, None)
        batch.tbo_split_seq_index = two_batch_overlap.compute_split_seq_index(mode, len(batch.input_ids), lens, per_seq)
        with forward_context(ForwardContext(attn_backend=self.backend)):
            two_batch_overlap.TboForwardBatchPreparer.prepare(batch)

    def check(self, batch: ForwardBatch, planned: bool = False) -> None:
        """Both halves, the first before the second, as in each layer of a model; then the whole on the primary."""
        if not planned:
            self.backend.init_forward_metadata(batch)
        layer, tokens = self.runner.model[0], len(batch.out_cache_loc)
        q, k, v = (self.scheduler.random(tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        got = []
        for backend, child in zip(self.backend.children, batch.tbo_children, strict=True):
            begin, end = child.tbo_parent_token_range
            if begin < end:
                mine = [x.new_zeros(len(child.input_ids), *x.shape[1:]) for x in (q, k, v)]
                for x, whole in zip(mine, (q, k, v), strict=True):
                    x[: end - begin] = whole[begin:end]
                out = backend.forward(mine[0].flatten(1), *mine[1:], layer, child)
                assert not out[end - begin :].any(), "tokens that pad a half"
                got.append(out[: end - begin])
        pool = self.scheduler.pool
        want = reference.extend(
            q,
            pool.get_key_buffer(0),
            pool.get_value_buffer(0),
            self.scheduler.table,
            batch.req_pool_indices,
            batch.seq_lens,
            torch.ones_like(batch.seq_lens) if batch.extend_seq_lens is None else batch.extend_seq_lens,
            page_size=1,
            scale=SCALE,
        ).flatten(1)
        torch.testing.assert_close(torch.cat(got).double(), want, atol=1e-5, rtol=1e-5)
        whole = self.backend.forward(q.flatten(1), k, v, layer, batch)
        torch.testing.assert_close(whole.double(), want, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=[False, True], ids=["PyTorch", "tables of a GPU"])
def kernels(request) -> bool:
    return request.param


@pytest.mark.parametrize("count", [5, 2, 1])
def test_decode(count, kernels, monkeypatch):
    """One request leaves the first half empty, which gets no plan and no forward."""
    overlapping = Overlapping(kernels, monkeypatch)
    batch = overlapping.batch(overlapping.rows[:count], None)
    overlapping.split(batch)
    assert [x.batch_size for x in batch.tbo_children] == [count // 2, count - count // 2]
    overlapping.check(batch)


def test_each_half_shares_its_prefix(monkeypatch):
    overlapping = Overlapping(False, monkeypatch)
    batch = overlapping.batch(overlapping.rows[:4], None)
    overlapping.split(batch)
    overlapping.check(batch)
    for backend in overlapping.backend.children:
        assert backend.forward_metadata.layout.segment_positions[0].tolist() == [0, SHARED]


def test_extend_between_requests(kernels, monkeypatch):
    overlapping = Overlapping(kernels, monkeypatch)
    batch = overlapping.batch(overlapping.rows[1:], [30, 31, 30, 31])
    overlapping.split(batch)
    assert [x.batch_size for x in batch.tbo_children] == [2, 2]
    overlapping.check(batch)


def test_extend_of_one_request_in_two_chunks(kernels, monkeypatch):
    """Where a cut between requests is too uneven, one request's tokens are in both halves."""
    overlapping = Overlapping(kernels, monkeypatch)
    batch = overlapping.batch([overlapping.rows[4]], [40])
    overlapping.split(batch)
    assert [x.extend_num_tokens for x in batch.tbo_children] == [20, 20]
    assert [x.batch_size for x in batch.tbo_children] == [1, 1]
    overlapping.check(batch)


def test_halves_that_are_padded(kernels, monkeypatch):
    """For data-parallel attention each half is as many tokens as its ranks divide."""
    overlapping = Overlapping(kernels, monkeypatch, attention_ranks=4)
    for q_lens in (None, [40]):
        rows = overlapping.rows[:5] if q_lens is None else overlapping.rows[4:]
        batch = overlapping.batch(rows, q_lens)
        overlapping.split(batch)
        for child in batch.tbo_children:
            if hasattr(child, "_pad_tbo_child_inputs"):  # 0.5.23
                child._pad_tbo_child_inputs(overlapping.runner)
            else:
                child._pad_inputs_to_size(overlapping.runner, child.tbo_padded_len, child.batch_size)
        overlapping.check(batch)


def test_replayed_decode(monkeypatch):
    """Captured on batches in halves, replayed on views that SGLang cuts anew; more requests come later."""
    overlapping = Overlapping(True, monkeypatch)
    tbo = overlapping.backend
    tbo.init_cuda_graph_state(6, 6)
    captured = overlapping.batch(overlapping.rows[:1] * 6, None)
    overlapping.split(captured)
    tbo.init_forward_metadata_out_graph(captured, in_capture=True)
    tbo.init_forward_metadata_in_graph(captured)
    for rows in (overlapping.rows[:3], overlapping.rows):
        real = overlapping.batch(rows, None)
        padding = 6 - len(rows)
        view = SimpleNamespace(
            batch_size=6,
            forward_mode=ForwardMode.DECODE,
            actual_forward_mode=ForwardMode.DECODE,
            input_ids=torch.zeros(6, dtype=torch.int64),
            req_pool_indices=torch.cat([real.req_pool_indices, torch.zeros(padding, dtype=torch.int64)]),
            seq_lens=torch.cat([real.seq_lens, torch.ones(padding, dtype=torch.int64)]),
            out_cache_loc=torch.cat([real.out_cache_loc, torch.zeros(padding, dtype=torch.int64)]),
            encoder_lens=None,
            spec_info=None,
            max_seq_len_override=None,
            kv_loc_plan=None,
            out_cache_loc_is_physical=True,
        )
        view.seq_lens_cpu = view.seq_lens
        tbo.init_forward_metadata_out_graph(view)
        for backend in (tbo.primary, *tbo.children):
            assert isinstance(backend.forward_metadata, GpuStep)
            backend.forward_metadata.plan()  # as the graph does
        view.tbo_children = [
            SimpleNamespace(
                forward_mode=ForwardMode.DECODE,
                tbo_parent_token_range=(at, at + 3),
                input_ids=view.input_ids[at : at + 3],
                out_cache_loc=view.out_cache_loc[at : at + 3],
                out_cache_loc_is_physical=True,
            )
            for at in (0, 3)
        ]
        view.extend_seq_lens = None
        overlapping.check(view, planned=True)


def test_batches_of_equal_halves_on_each_rank_have_their_rows(monkeypatch):
    """SGLang pads to more rows than requests may run, and captures graphs of them, where their number does not divide.

    As its ``get_batch_sizes_to_capture`` does: 5 requests on 4 ranks of attention are 8 rows in two halves.
    """
    fake_kernels.install(monkeypatch)
    runner = make_runner(max_requests=5)
    runner.server_args.tp_size = 4
    assert FlashCoreSparseBackend(runner)._make_gpu(runner).max_rows == 8
