"""Our backend over SGLang's radix cache: prefix hits, eviction, and slots that pass to another request."""

from __future__ import annotations

import random
from array import array

import needs
import pytest
import torch

needs.sglang()

from contract.sglang_fixtures import DIM, HEADS, KV_HEADS, SCALE, MiniScheduler, make_runner
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from unit import fake_kernels

from flashcore_sglang import reference
from flashcore_sglang.backend import FlashCoreSparseBackend

pytestmark = pytest.mark.contract


class Server:
    """A scheduler and our backend; every forward is compared with the reference."""

    def __init__(self, seed: int = 0, **runner) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.runner = make_runner(**runner)
        self.scheduler = MiniScheduler(self.runner, self.generator)
        self.backend = FlashCoreSparseBackend(self.runner)
        self.layer = self.runner.model[0]

    def forward(self, rows: list[int], q_lens: list[int] | None = None) -> torch.Tensor:
        batch = self.scheduler.batch(rows, q_lens)
        tokens = len(batch.out_cache_loc)
        q = self.scheduler.random(tokens, HEADS * DIM)
        k, v = self.scheduler.random(tokens, KV_HEADS, DIM), self.scheduler.random(tokens, KV_HEADS, DIM)
        self.backend.init_forward_metadata(batch)
        step = self.backend.forward_decode if q_lens is None else self.backend.forward_extend
        got = step(q, k, v, self.layer, batch)
        pool = self.runner.token_to_kv_pool
        want = reference.extend(
            q.view(tokens, HEADS, DIM),
            pool.get_key_buffer(0),
            pool.get_value_buffer(0),
            self.scheduler.table,
            batch.req_pool_indices,
            batch.seq_lens,
            batch.extend_seq_lens,
            page_size=1,
            scale=SCALE,
        )
        assert got.isfinite().all(), "a slot that the requests do not own was read"
        torch.testing.assert_close(got.view_as(want).double(), want, atol=1e-5, rtol=1e-5)
        return got

    def start(self, tokens: list[int]) -> tuple[int, int]:
        row, cached = self.scheduler.add(tokens)
        self.forward([row], [len(tokens) - cached])
        self.scheduler.publish(row)
        return row, cached

    def decode(self, rows: list[int], token: int = 7) -> torch.Tensor:
        for row in rows:
            self.scheduler.append(row, token + row)
        return self.forward(rows)

    def segments(self, rows: list[int]):
        batch = self.scheduler.batch(rows)
        self.backend.init_forward_metadata(batch)
        return self.backend.forward_metadata.layout


SYSTEM = list(range(100, 400))  # 300 tokens, enough for sharing to pay


def test_prefix_hit_is_read_once_for_all_requests():
    server = Server(slots=2048, context=512)
    rows = []
    for i in range(6):
        row, cached = server.start([*SYSTEM, 1000 + i, 2000 + i])
        assert cached == (len(SYSTEM) if i else 0)
        rows.append(row)
    server.decode(rows)
    layout = server.segments(rows)
    assert layout.segment_positions[0].tolist() == [0, len(SYSTEM)]
    assert layout.segment_rows[0].tolist() == [0, len(rows)]
    assert layout.tokens_stored == len(SYSTEM) + 3 * len(rows)


def test_first_steps_before_duplicates_merge_are_right():
    server = Server(slots=2048, context=512)
    scheduler = server.scheduler
    rows = [scheduler.add([*SYSTEM, 1000 + i])[0] for i in range(4)]  # none published: four private copies
    server.forward(rows, [len(SYSTEM) + 1] * 4)
    assert server.segments(rows).num_segments == 4
    for row in rows:
        scheduler.publish(row)  # rewrites the rows to one copy and frees the others
    server.decode(rows)
    assert server.segments(rows).segment_rows[0].tolist() == [0, 4]


def test_slots_freed_and_reused_by_another_request_never_leak():
    server = Server(slots=160, context=160)
    keep, _ = server.start([*SYSTEM[:40], 1])
    gone, _ = server.start([*SYSTEM[:40], *range(500, 540)])
    server.decode([keep, gone])
    old = set(server.scheduler.table[gone, 40:82].tolist())
    server.scheduler.finish(gone)
    new, cached = server.start(list(range(700, 790)))  # evicts the finished request and takes its slots
    assert cached == 0 and old & set(server.scheduler.table[new, :90].tolist())
    server.decode([keep, new])
    server.decode([new, keep])


def test_row_reused_by_another_request_of_the_same_length_is_noticed():
    server = Server(slots=2048, context=512)
    a, _ = server.start([*SYSTEM, 1, 2, 3])
    b, _ = server.start([*SYSTEM, 4, 5, 6])
    server.decode([a, b])
    server.decode([a, b])
    length = len(server.scheduler.tokens[b])
    server.scheduler.finish(b)
    server.scheduler.free_rows.sort(key=lambda r: r != b)
    again, _ = server.start(list(range(900, 900 + length)))
    assert again == b
    server.decode([a, again])  # the same pool indices and length + 1 as the step that never came
    assert server.segments([a, again]).num_segments == 2


class Loading:
    """Of HiCache's ``LayerDoneCounter``: a layer's K and V are there when somebody has waited for it."""

    def __init__(self, pool, slots: torch.Tensor, host: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.pool, self.slots, self.host, self.waited = pool, slots, host, 0

    def wait_until(self, layer: int) -> None:
        self.waited += 1
        self.pool.k_buffer[layer][self.slots], self.pool.v_buffer[layer][self.slots] = self.host


@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "tables of a GPU"])
def test_prefix_that_hicache_loads_back_is_waited_for(kernels, monkeypatch):
    """It goes to the host and comes back into other slots, layer by layer."""
    server = Server(slots=760, context=512)
    if kernels:
        fake_kernels.install(monkeypatch)
        server.backend._gpu = server.backend._make_gpu(server.runner)
    scheduler, pool = server.scheduler, server.runner.token_to_kv_pool
    rows = [server.start([*SYSTEM, 1000 + i])[0] for i in range(2)]
    server.decode(rows)
    old = scheduler.table[rows[0], : len(SYSTEM)].long()
    host = pool.get_key_buffer(0)[old].clone(), pool.get_value_buffer(0)[old].clone()
    for row in rows:
        scheduler.finish(row)
    scheduler.tree.evict(EvictParams(num_tokens=2 * len(SYSTEM)))
    scheduler.poison()
    loaded = scheduler.alloc(len(SYSTEM))
    assert not torch.equal(loaded, old)
    scheduler.tree.insert(InsertParams(key=RadixKey(array("q", SYSTEM), None), value=loaded))
    loading = Loading(pool, loaded, host)
    pool.register_layer_transfer_counter(loading)
    rows = []
    for i in range(2):
        row, cached = scheduler.add([*SYSTEM, 2000 + i])
        assert cached == len(SYSTEM)
        rows.append(row)
    server.forward(rows, [1, 1])  # reads NaN in what was not waited for
    assert loading.waited
    server.decode(rows)


def test_decode_server_of_pd_disaggregation_serves_rows_beyond_its_batch(monkeypatch):
    """Its table has rows for requests whose K and V are on their way; the prefill server wrote what they have."""
    from sglang.srt.disaggregation.decode import DecodeReqToTokenPool

    table = DecodeReqToTokenPool(size=4, max_context_len=512, device="cpu", enable_memory_saver=False, pre_alloc_size=8)
    server = Server(slots=2048, context=512, req_to_token_pool=table)
    scheduler = server.scheduler
    rows = []
    for i in range(table.size):
        tokens, row = [*SYSTEM, 1000 + i], scheduler.free_rows.pop()
        slots = scheduler.alloc(len(tokens))
        table.req_to_token[row, : len(tokens)] = slots.to(torch.int32)
        scheduler.tokens[row] = tokens
        scheduler.pool.get_key_buffer(0)[slots] = scheduler.random(len(tokens), KV_HEADS, DIM)
        scheduler.pool.get_value_buffer(0)[slots] = scheduler.random(len(tokens), KV_HEADS, DIM)
        rows.append(row)
    assert min(rows) > table.size
    server.decode(rows)
    assert server.segments(rows).num_segments == len(rows), "nothing is shared without a radix cache"
    assert server.backend.facts.max_requests == table.size
    fake_kernels.install(monkeypatch)
    server.backend._gpu = server.backend._make_gpu(server.runner)
    assert server.backend._gpu.max_rows == table.size, "no buffers for requests that do not run"
    server.decode(rows)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_equals_reference(seed):
    """Arrivals, decodes, mixed chunks, ends and evictions in random order, every free slot poisoned."""
    server, choice = Server(seed, slots=420, max_requests=10, context=160), random.Random(seed)
    rows: list[int] = []
    for _ in range(60):
        event = choice.random()
        if event < 0.3 and len(rows) < 8:
            group = choice.randrange(3)
            prompt = [group] * choice.choice([1, 20, 70]) + [
                choice.randrange(4) for _ in range(choice.randrange(1, 12))
            ]
            room = server.scheduler.allocator.available_size() + server.scheduler.tree.evictable_size()
            if room > len(prompt) + 30:
                rows.append(server.start(prompt)[0])
        elif event < 0.4 and rows:
            server.scheduler.finish(rows.pop(choice.randrange(len(rows))))
        elif event < 0.5 and len(rows) > 1:
            for row in rows:
                server.scheduler.append(row, 9)
            server.forward(rows, [1] * len(rows))  # a mixed batch runs its decodes as extends of one token
        elif rows:
            choice.shuffle(rows)
            server.decode(rows, choice.randrange(50))


def test_corrupt_table_reads_padding_and_spares_the_others(caplog):
    server = Server(slots=2048, context=512)
    pool = server.runner.token_to_kv_pool
    good, _ = server.start([*SYSTEM, 1])
    bad, _ = server.start(list(range(600, 640)))
    clean = server.scheduler.table[bad].clone()
    pool.get_key_buffer(0)[0], pool.get_value_buffer(0)[0] = 0.0, 0.0  # the padding slot
    for row in (good, bad):
        server.scheduler.append(row, 5)
    server.scheduler.table[bad, 3] = 10_000_000
    batch = server.scheduler.batch([good, bad])
    q = server.scheduler.random(2, HEADS * DIM)
    kv = server.scheduler.random(2, KV_HEADS, DIM)
    server.backend.init_forward_metadata(batch)
    got = server.backend.forward_decode(q, kv, kv, server.layer, batch)
    assert got.isfinite().all()
    assert "want 0 <= slot < 2049, got 10000000 at row 1, position 3" in caplog.text
    alone = server.scheduler.batch([good])
    server.backend.init_forward_metadata(alone)
    torch.testing.assert_close(got[:1], server.backend.forward_decode(q[:1], kv[:1], kv[:1], server.layer, alone))
    server.scheduler.table[bad, :40] = clean[:40]
    server.decode([good, bad])  # and goes on
