"""SGLang's own pools and radix cache around our backend, without a model or a server."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardMode

HEADS, KV_HEADS, DIM = 6, 2, 16
SCALE = DIM**-0.5


def make_runner(
    *,
    slots: int = 256,
    max_requests: int = 16,
    context: int = 128,
    page_size: int = 1,
    layers: int = 1,
    pool_dtype=torch.float32,
    **changes,
):
    """What our backend reads of a ModelRunner, with real pools on the CPU; ``changes`` override attributes."""
    pool = MHATokenToKVPool(
        size=slots,
        page_size=page_size,
        dtype=pool_dtype,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    layer = RadixAttention(HEADS, DIM, SCALE, KV_HEADS, layer_id=0)
    runner = SimpleNamespace(
        device="cpu",
        page_size=page_size,
        dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        use_mla_backend=False,
        model=torch.nn.ModuleList([layer]),
        model_config=SimpleNamespace(context_len=context, is_encoder_decoder=False),
        server_args=SimpleNamespace(speculative_algorithm=None, enable_deterministic_inference=False),
        req_to_token_pool=ReqToTokenPool(
            size=max_requests, max_context_len=context, device="cpu", enable_memory_saver=False
        ),
        token_to_kv_pool=pool,
    )
    vars(runner).update(changes)
    return runner


def forward_batch(
    table: torch.Tensor, rows: list[int], seq_lens: list[int], q_lens: list[int] | None = None
) -> SimpleNamespace:
    """The ForwardBatch of these rows of ``table``: decode, or an extend of the last ``q_lens`` tokens of each."""
    lens, counts = torch.tensor(seq_lens), torch.tensor(q_lens or [1] * len(rows))
    slots = [table[r, n - q : n].long() for r, n, q in zip(rows, seq_lens, counts.tolist(), strict=True)]
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE if q_lens is None else ForwardMode.EXTEND,
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=lens,
        extend_seq_lens=counts,
        extend_prefix_lens=lens - counts,
        out_cache_loc=torch.cat(slots),
        out_cache_loc_is_physical=True,  # 0.5.23
    )


class MiniScheduler:
    """Requests over SGLang's radix cache, allocator and pools at page size 1, as its scheduler drives them.

    Slots that no request and no cached prefix owns hold NaN.
    """

    def __init__(self, runner, generator: torch.Generator) -> None:
        self.runner, self.generator = runner, generator
        self.pool, self.table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
        self.allocator = TokenToKVPoolAllocator(
            self.pool.size, torch.float32, device="cpu", kvcache=self.pool, need_sort=False
        )
        self.tree = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=runner.req_to_token_pool,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
            )
        )
        self.free_rows = list(range(1, self.table.shape[0]))
        self.tokens: dict[int, list[int]] = {}  # row -> tokens whose KV is in the pool
        self.nodes: dict[int, object] = {}
        self.poison()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def poison(self) -> None:
        free = torch.cat([self.allocator.free_pages, self.allocator.release_pages]).long()
        self.pool.get_key_buffer(0)[free] = torch.nan
        self.pool.get_value_buffer(0)[free] = torch.nan

    def alloc(self, count: int) -> torch.Tensor:
        if self.allocator.available_size() < count:
            self.tree.evict(EvictParams(num_tokens=count - self.allocator.available_size()))
            self.poison()
        slots = self.allocator.alloc(count)
        assert slots is not None, "the test's pool is too small"
        return slots

    def match(self, tokens: list[int]) -> tuple[object, torch.Tensor]:
        """The tree's node and slots for the longest cached prefix."""
        key = RadixKey(array("q", tokens), None)
        last = node = self.tree.match_prefix(MatchPrefixParams(key=key)).last_device_node
        values = []
        while node is not self.tree.root_node:
            values.insert(0, node.value)
            node = node.parent
        return last, torch.cat(values) if values else torch.empty(0, dtype=torch.int64)

    def add(self, tokens: list[int]) -> tuple[int, int]:
        """Starts a request; returns its row and the length of the cached prefix. The caller runs the extend."""
        node, prefix = self.match(tokens[:-1])
        self.tree.inc_lock_ref(node)
        row = self.free_rows.pop(0)
        self.table[row, : len(prefix)] = prefix.to(torch.int32)
        self.table[row, len(prefix) : len(tokens)] = self.alloc(len(tokens) - len(prefix)).to(torch.int32)
        self.tokens[row], self.nodes[row] = list(tokens), node
        return row, len(prefix)

    def publish(self, row: int) -> None:
        """After its extend: the prompt joins the tree, duplicates are freed, the row takes the tree's slots."""
        tokens = self.tokens[row]
        own = self.table[row, : len(tokens)].long().clone()
        before = len(self.match(tokens)[1])
        self.tree.insert(InsertParams(key=RadixKey(array("q", tokens), None), value=own.clone()))
        node, slots = self.match(tokens)
        self.allocator.free(own[:before][own[:before] != slots[:before]])
        self.table[row, : len(tokens)] = slots.to(torch.int32)
        self.tree.inc_lock_ref(node)
        self.tree.dec_lock_ref(self.nodes[row])
        self.nodes[row] = node
        self.poison()

    def append(self, row: int, token: int) -> torch.Tensor:
        """Room for one generated token; returns its slot."""
        slot = self.alloc(1)
        self.table[row, len(self.tokens[row])] = int(slot)
        self.tokens[row].append(token)
        return slot

    def finish(self, row: int) -> None:
        self.publish(row)
        self.tree.dec_lock_ref(self.nodes.pop(row))
        self.tokens.pop(row)
        self.free_rows.append(row)

    def batch(self, rows: list[int], q_lens: list[int] | None = None) -> SimpleNamespace:
        """The ForwardBatch of these rows: decode, or an extend of the last ``q_lens`` tokens of each."""
        return forward_batch(self.table, rows, [len(self.tokens[r]) for r in rows], q_lens)
