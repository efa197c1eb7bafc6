"""Models with sliding windows or chunks: one pool for all layers, and SGLang's pair of pools, each with its slots."""

from __future__ import annotations

from types import SimpleNamespace

import needs
import pytest
import torch

needs.sglang()

from contract.sglang_fixtures import DIM, HEADS, KV_HEADS, SCALE, forward_batch, make_runner
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from unit import fake_kernels

from flashcore_sglang import reference
from flashcore_sglang.backend import FlashCoreSparseBackend
from flashcore_sglang.gpu_attention import GpuStep
from flashcore_sglang.step import Step

pytestmark = pytest.mark.contract

WINDOW, SLOTS, LENS = 5, 256, [40, 37, 3]
FULL, WINDOWED = 0, 1  # layers


class Hybrid:
    """Three requests on a model of two layers; the first two share 30 positions."""

    def __init__(self, page_size: int, two_pools: bool, chunk: int = 0) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.page_size = page_size
        pool_options = {
            "page_size": page_size,
            "dtype": torch.float32,
            "head_num": KV_HEADS,
            "head_dim": DIM,
            "device": "cpu",
        }
        changes: dict = {}
        if two_pools:
            changes["token_to_kv_pool"] = SWAKVPool(
                size=SLOTS,
                size_swa=SLOTS // 2,
                swa_attention_layer_ids=[WINDOWED],
                full_attention_layer_ids=[FULL],
                **pool_options,
            )
        self.layers = [
            RadixAttention(HEADS, DIM, SCALE, KV_HEADS, layer_id=FULL),
            RadixAttention(
                HEADS,
                DIM,
                SCALE,
                KV_HEADS,
                layer_id=WINDOWED,
                sliding_window_size=-1 if chunk else WINDOW,
                use_irope=chunk > 0,
            ),
        ]
        self.chunk = changes["attention_chunk_size"] = chunk
        self.runner = make_runner(
            slots=SLOTS, page_size=page_size, layers=2, model=torch.nn.ModuleList(self.layers), **changes
        )
        self.pool, self.table = self.runner.token_to_kv_pool, self.runner.req_to_token_pool.req_to_token
        self._fill_tables()
        self.slot_map = self._map() if two_pools else None
        for layer in (FULL, WINDOWED):
            for buffer in (self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer)):
                buffer.copy_(torch.randn(buffer.shape, generator=self.random))
        self.backend = FlashCoreSparseBackend(self.runner)

    def _fill_tables(self) -> None:
        size = self.page_size
        pages = (torch.randperm(SLOTS // size - 1, generator=self.random) + 1).tolist()
        for row, length in enumerate(LENS, start=1):
            for block in range(-(-length // size)):
                first = pages.pop() * size
                self.table[row, block * size : (block + 1) * size] = torch.arange(first, first + size)
        shared = 30 // size * size
        self.table[2, :shared] = self.table[1, :shared]

    def _map(self) -> torch.Tensor:
        """A page of the small pool for each page that some request's last tokens use; 0 for the others."""
        size = self.page_size
        slot_map = torch.zeros(SLOTS + size + 1, dtype=torch.int64)
        free = iter((torch.randperm(SLOTS // 2 // size, generator=self.random) + 1).tolist())
        for page in sorted({int(s) // size for row in (1, 2, 3) for s in self.table[row, : LENS[row - 1]]}):
            first = next(free) * size
            slot_map[page * size : (page + 1) * size] = torch.arange(first, first + size)
        self.pool.register_mapping(slot_map)
        return slot_map

    def forget(self, queries: int = 1) -> None:
        """Fills with NaN what no window reaches, and takes it out of the map, as SGLang does in time."""
        seen = torch.zeros(SLOTS + self.page_size, dtype=torch.bool)
        for row, length in enumerate(LENS, start=1):
            first = length - queries
            first = first // self.chunk * self.chunk if self.chunk else first - WINDOW
            seen[self.table[row, max(0, first) : length].long()] = True
        if self.slot_map is not None:
            pages = seen.view(-1, self.page_size).any(dim=1).repeat_interleave(self.page_size)
            self.slot_map[: len(seen)][~pages] = 0
            kept = torch.zeros(len(self.pool.get_key_buffer(WINDOWED)), dtype=torch.bool)
            kept[self.slot_map[: len(seen)][seen]] = True
        else:
            kept = seen
        for buffer in (self.pool.get_key_buffer(WINDOWED), self.pool.get_value_buffer(WINDOWED)):
            buffer[~kept] = torch.nan

    def batch(self, q_lens: list[int] | None) -> SimpleNamespace:
        return forward_batch(self.table, list(range(1, len(LENS) + 1)), LENS, q_lens)

    def check(self, layer: RadixAttention, batch: SimpleNamespace) -> None:
        tokens = int(batch.extend_seq_lens.sum())
        q, k, v = (torch.randn(tokens, h * DIM, generator=self.random) for h in (HEADS, KV_HEADS, KV_HEADS))
        got = self.backend.forward(q, k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM), layer, batch)
        slots = self.table if layer.layer_id == FULL or self.slot_map is None else self.slot_map[self.table.long()]
        caches = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        want = reference.extend(
            q.view(-1, HEADS, DIM),
            *(x.nan_to_num(0.0) for x in caches),
            slots,
            batch.req_pool_indices,
            batch.seq_lens,
            batch.extend_seq_lens,
            page_size=self.page_size,
            scale=SCALE,
            window_left=layer.sliding_window_size,
            chunk=self.chunk if layer.use_irope else 0,
        )
        torch.testing.assert_close(got.double(), want.view(tokens, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "tables of a GPU"])
@pytest.mark.parametrize("q_lens", [None, [3, 7, 2]], ids=["decode", "extend"])
@pytest.mark.parametrize("two_pools", [False, True], ids=["one pool", "two pools"])
@pytest.mark.parametrize("chunk", [0, 16], ids=["window", "chunks"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_full_and_windowed_layers_of_a_step(page_size, chunk, two_pools, q_lens, kernels, monkeypatch):
    if page_size == 4:
        monkeypatch.setattr("flashcore_sglang.requirements.PAGE_SIZES", (1, 4, 16))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = Hybrid(page_size, two_pools, chunk)
    if kernels:
        fake_kernels.install(monkeypatch)
        model.backend._gpu = model.backend._make_gpu(model.runner)
    model.forget(max(q_lens or [1]))
    batch = model.batch(q_lens)
    model.backend.init_forward_metadata(batch)
    assert isinstance(model.backend.forward_metadata, GpuStep) is kernels
    for layer in model.layers:
        model.check(layer, batch)


def test_largest_batch_in_as_many_chunks_as_can_be_goes_to_the_kernels(monkeypatch):
    model = Hybrid(1, two_pools=False, chunk=16)
    fake_kernels.install(monkeypatch)
    requests, chunked_prefill_size = model.runner.req_to_token_pool.size, 64
    model.runner.server_args.chunked_prefill_size = chunked_prefill_size
    gpu = model.backend._make_gpu(model.runner)
    rows = torch.arange(requests)
    assert gpu.serves(Step(rows, rows, rows, num_tokens=chunked_prefill_size, max_queries=chunked_prefill_size))
    assert not gpu.serves(Step(rows, rows, rows, num_tokens=10 * chunked_prefill_size, max_queries=1))


def test_what_pads_a_batch_is_written_to_the_padding_slot():
    model = Hybrid(1, True)
    model.backend.init_cuda_graph_state(4, 4)
    model.backend._translate_out_cache_loc(model.batch(None))
    batch = model.batch(None)
    batch.out_cache_loc = batch.out_cache_loc[:1]
    model.backend._translate_out_cache_loc(batch)
    static = model.backend._static_window_loc
    assert static.tolist() == [int(model.slot_map[batch.out_cache_loc[0]]), 0, 0, 0]
    assert model.backend._window_loc.data_ptr() == static.data_ptr()


def test_translation_is_read_when_the_step_is_planned():
    """The scheduler frees slots of windows while the step runs."""
    model = Hybrid(1, True)
    model.forget()
    batch = model.batch(None)
    model.backend.init_forward_metadata(batch)
    kept = model.slot_map.clone()
    model.slot_map.zero_()
    q, k, v = (torch.randn(len(LENS), h * DIM, generator=model.random) for h in (HEADS, KV_HEADS, KV_HEADS))
    got = model.backend.forward(q, k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM), model.layers[WINDOWED], batch)
    model.slot_map.copy_(kept)
    assert got.isfinite().all()
    caches = model.pool.get_key_buffer(WINDOWED), model.pool.get_value_buffer(WINDOWED)
    want = reference.extend(
        q.view(-1, HEADS, DIM),
        *(x.nan_to_num(0.0) for x in caches),
        model.slot_map[model.table.long()],
        batch.req_pool_indices,
        batch.seq_lens,
        batch.extend_seq_lens,
        page_size=1,
        scale=SCALE,
        window_left=WINDOW,
    )
    torch.testing.assert_close(got.double(), want.view(len(LENS), -1), atol=1e-5, rtol=1e-5)
