"""Forests of requests over a paged pool, and the kernels of the CUDA library called on them, for the GPU tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcore_sglang import build, gpu_decode
from flashcore_sglang.config import SHARE_ALWAYS, CostModel, schedule_costs
from flashcore_sglang.layout import CsrLayout, build_layout_from_slots


@dataclass
class Forest:
    """Requests over a pool. ``table`` [B + 1, T]: slots of request r in row r + 1; row 0 is padding."""

    page_size: int
    num_pages: int
    table: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def batch(self) -> int:
        return self.seq_lens.numel()

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    def slots(self, request: int) -> torch.Tensor:
        return self.table[request + 1, : int(self.seq_lens[request])].long()

    @property
    def owned(self) -> torch.Tensor:
        """[num_slots] bool: the slots that some request owns."""
        owned = torch.zeros(self.num_slots, dtype=torch.bool)
        for r in range(self.batch):
            owned[self.slots(r)] = True
        return owned

    def layout(self, cost: CostModel = SHARE_ALWAYS) -> CsrLayout:
        return build_layout_from_slots(
            self.table,
            torch.arange(1, self.batch + 1),
            self.seq_lens,
            self.page_size,
            num_pages=self.num_pages,
            cost_model=cost,
        )

    def reordered(self, order: torch.Tensor) -> Forest:
        table = torch.cat([self.table[:1], self.table[1:][order]])
        return Forest(self.page_size, self.num_pages, table, self.seq_lens[order])


Level = tuple[int | tuple[int, ...], int]
"""(nodes, tokens) of one level of a tree: a number of nodes of equally many requests, or the requests of each node."""


def nodes_of(nodes: int | tuple[int, ...], batch: int) -> torch.Tensor:
    """[batch] the node that each request belongs to; ascending."""
    if isinstance(nodes, int):
        return torch.arange(batch) * nodes // batch
    return torch.repeat_interleave(torch.arange(len(nodes)), torch.tensor(nodes))


def _scattered(pages: int, order: str, generator: torch.Generator) -> torch.Tensor:
    """Where each of a pool's pages goes. "permuted": anywhere. "fragmented": in runs of 1 to 31, as after churn."""
    if order == "permuted":
        return torch.randperm(pages, generator=generator, dtype=torch.int32)
    cuts = torch.randint(1, 32, (pages,), generator=generator).cumsum(0)
    run = torch.searchsorted(cuts, torch.arange(pages), right=True)
    place = torch.randperm(int(run[-1]) + 1, generator=generator)[run]
    where = torch.empty(pages, dtype=torch.int32)
    where[place.argsort(stable=True)] = torch.arange(pages, dtype=torch.int32)
    return where


def forest(
    levels: Sequence[Level], page_size: int = 1, order: str = "runs", lens: list[int] | None = None, seed: int = 0
) -> Forest:
    """Tree with ``levels`` of (nodes, tokens); the last level's nodes are the requests, tokens the longest of them.

    ``order``: "runs" (a node's pages are consecutive), "interleaved" (the last level's pages lie ``requests`` apart, as
    generated tokens do), "fragmented" (all pages in short runs) or "permuted". ``lens``: own tokens of each request on
    the last level.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = levels[-1][0]
    assert isinstance(batch, int)
    next_page, columns = 1, []  # page 0 is padding
    for depth, (nodes, tokens) in enumerate(levels):
        blocks = -(-tokens // page_size)
        last = depth == len(levels) - 1
        assert last or tokens % page_size == 0
        count = nodes if isinstance(nodes, int) else len(nodes)
        ids = torch.arange(count * blocks, dtype=torch.int32)
        ids = ids.view(blocks, count).T if order == "interleaved" and last else ids.view(count, blocks)
        columns.append((next_page + ids)[nodes_of(nodes, batch)])
        next_page += count * blocks
    pages = torch.cat(columns, 1)
    if order in ("permuted", "fragmented"):
        pages = 1 + _scattered(next_page - 1, order, generator)[pages.long() - 1]
    slots = (pages.unsqueeze(-1) * page_size + torch.arange(page_size, dtype=torch.int32)).view(batch, -1)
    shared = sum(tokens for _, tokens in levels[:-1])
    own = torch.tensor(lens if lens is not None else [levels[-1][1]] * batch)
    table = torch.zeros(batch + 1, slots.shape[1], dtype=torch.int32)
    table[1:] = slots
    return Forest(page_size, next_page, table, (shared + own).to(torch.int32))


Epoch = tuple[int, int]
"""(slots from one token to the next, tokens) that a request generated while the batch was of one size."""


def of_slots(rows: Sequence[torch.Tensor], num_slots: int) -> Forest:
    """Requests of these slots, on pages of one token."""
    lens = torch.tensor([row.numel() for row in rows], dtype=torch.int32)
    table = torch.zeros(len(rows) + 1, int(lens.max()), dtype=torch.int32)
    for r, row in enumerate(rows):
        table[r + 1, : row.numel()] = row
    return Forest(1, num_slots, table, lens)


def strided(requests: Sequence[Sequence[Epoch]]) -> Forest:
    """Requests of epochs, on pages of one token, that share nothing. A negative step goes down."""
    rows, next_slot = [], 1
    for epochs in requests:
        parts = []
        for step, tokens in epochs:
            part = next_slot + torch.arange(tokens, dtype=torch.int32) * abs(step)
            parts.append(part.flip(0) if step < 0 else part)
            next_slot += abs(step) * tokens
        rows.append(torch.cat(parts))
    return of_slots(rows, next_slot)


def runs(requests: Sequence[Sequence[int]]) -> Forest:
    """Requests of runs of so many tokens, on pages of one token, a slot of nobody's between any two; nothing is shared.
    The last run ends with the pool."""
    rows, next_slot = [], 0
    for lengths in requests:
        parts = []
        for length in lengths:
            next_slot += 1
            parts.append(torch.arange(next_slot, next_slot + length, dtype=torch.int32))
            next_slot += length
        rows.append(torch.cat(parts))
    return of_slots(rows, next_slot)


RUNS: list[list[int]] = [
    *([n] for n in range(1, 136)),
    *([a, b] for a in (1, 7, 8, 31, 32, 33, 64, 100, 127, 128, 130) for b in (1, 8, 24, 33, 95, 128, 200)),
    *([512], [513], [256, 256], [300, 213], [5, 6, 7], [1, 1, 1, 1], [128, 1, 128]),
]
"""Tokens of each run of a request: items of one run, of two, and requests of more (csrc/attention/runs.cu)."""


APART: list[list[Epoch]] = [
    [(2, 300)],
    [(64, 1000)],
    [(1, 128), (1000, 129)],
    [(7, 100), (6, 64), (5, 33), (4, 500), (3, 31), (6, 90)],  # more steps than a loader makes maps for
    [(-3, 200)],
    [(5, 32), (1, 32), (5, 32), (9, 8), (1, 300), (9, 40)],
]
"""Epochs of a request whose tokens lie apart."""

GENERATED: list[list[Epoch]] = [
    [(1, prompt), (step, tokens)]
    for step in (2, 7, 64)
    for prompt in (1, 5, 31, 100, 127)
    for tokens in (1, 2, 31, 32, 33, 64, 90, 128, 200)
]
"""Epochs of requests that have generated beside others: items of two runs, the second of tokens that lie apart."""


def random_case(rng: random.Random, orders: list[str]) -> tuple[Forest, int, int, int, torch.dtype]:
    """A forest of up to four levels; heads, KV heads, head dim, dtype of q."""
    page_size = rng.choice([1, 1, 16, 64])
    levels, nodes = [], 1
    for _ in range(rng.randint(0, 3)):
        nodes *= rng.choice([1, 2, 4])
        levels.append((nodes, page_size * rng.randint(1, 900 // page_size)))
    own = rng.randint(1, 700)
    nodes *= rng.choice([1, 3, 8])
    kv_heads = rng.choice([1, 2, 8])
    f = forest([*levels, (nodes, own)], page_size, rng.choice(orders), [rng.randint(1, own) for _ in range(nodes)])
    heads, head_dim = kv_heads * rng.choice([1, 2, 4, 7]), rng.choice([64, 128, 128, 256])
    return f, heads, kv_heads, head_dim, rng.choice([torch.bfloat16, torch.float16])


def pools(
    f: Forest, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V with NaN in every slot that no request owns."""
    generator = torch.Generator("cuda").manual_seed(seed)
    k, v = (
        torch.randn(f.num_slots, kv_heads, head_dim, device="cuda", dtype=dtype, generator=generator) for _ in range(2)
    )
    owned = f.owned.cuda()
    k[~owned] = float("nan")
    v[~owned] = float("nan")
    return k, v


def work_items(workspace: torch.Tensor, batch: int, segments: int, partials: int, ratio: int) -> torch.Tensor:
    """[entries, 8] what the schedule has written last (``WorkItem`` in csrc/attention/params.h)."""
    wide, narrow = workspace[:64].view(torch.int32)[2:4].tolist()
    at = 0
    for size in (64, 16 * batch, 32 * 256, 4 * 256, 4 * 256 * 256, 128 * 256 * 2 * 2):  # what comes before them
        at += -(-size // 256) * 256
    capacity = segments + 2048 + partials * ratio // 64
    items = workspace[at : at + 32 * capacity].view(torch.int32).view(capacity, 8)
    return torch.cat([items[:wide], items[capacity - narrow :].flip(0)]).cpu()


class Decode:
    """The kernels on one layout."""

    def __init__(
        self,
        layout: CsrLayout,
        heads: int,
        kv_heads: int,
        head_dim: int,
        partial_capacity: int | None = None,
        kv_dtype: torch.dtype = torch.bfloat16,
    ):
        self.costs = schedule_costs("hopper", kv_dtype)
        self.library = build.library("cuda")
        self.heads, self.kv_heads, self.head_dim, self.page_size = heads, kv_heads, head_dim, layout.page_size
        self.segments = max(layout.num_segments, 1)
        sizes = [
            layout.num_segments,
            layout.page_indices.numel(),
            layout.runs.shape[0],
            layout.row_segments.numel(),
            0,
            0,
            0,
            0,
        ]

        def pad(t: torch.Tensor, n: int) -> torch.Tensor:
            return torch.cat([t.flatten(), torch.zeros(max(0, n - t.numel()), dtype=torch.int32)]).cuda()

        self.sizes = torch.tensor(sizes, dtype=torch.int32).cuda()
        self.row_order = layout.row_order.cuda()
        self.segment_rows, self.segment_positions = pad(layout.segment_rows, 2), pad(layout.segment_positions, 2)
        self.page_indptr, self.page_indices = pad(layout.page_indptr, 2), pad(layout.page_indices, 1)
        self.partials = partial_capacity or gpu_decode.partial_capacity(layout.num_rows)
        size = self.library.decode_workspace_bytes(
            layout.num_rows, self.segments, heads, kv_heads, head_dim, self.partials
        )
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")

    def work_items(self) -> torch.Tensor:
        torch.cuda.synchronize()
        ratio = self.heads // self.kv_heads
        return work_items(self.workspace, self.row_order.numel(), self.segments, self.partials, ratio)

    def schedule(self) -> None:
        self.library.decode_schedule(
            self.sizes,
            self.row_order,
            self.segment_rows,
            self.segment_positions,
            self.page_indptr,
            self.page_indices,
            self.workspace,
            self.page_size,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.partials,
            *self.costs,
        )

    def run(self, q, k, v, out, *, scale: float, logit_cap=0.0, sinks=None, k_scale=None, v_scale=None) -> None:
        self.library.decode(
            q,
            k,
            v,
            self.page_indices,
            self.workspace,
            out,
            self.segments,
            self.partials,
            self.page_size,
            *gpu_decode.scale_arguments(scale, k_scale, v_scale, logit_cap, sinks),
        )

    def __call__(self, q, k, v, **options) -> torch.Tensor:
        self.schedule()
        out = torch.full_like(q, float("nan"))
        self.run(q, k, v, out, **options)
        return out


def exact(f: Forest, q, k, v, *, scale: float, logit_cap: float = 0.0, sinks=None, dtype=torch.float64) -> torch.Tensor:
    """Attention request by request in ``dtype``, the definition. Probabilities are rounded as ``dtype`` rounds."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    for r in range(f.batch):
        slots = f.slots(r).cuda()
        if slots.numel() == 0:
            continue
        keys, values = (x[slots].to(dtype).repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("hd,thd->ht", q[r].to(dtype), keys) * scale
        if logit_cap:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None]], 1)
        probs = torch.softmax(scores, 1)[:, : slots.numel()]
        out[r] = torch.einsum("ht,thd->hd", probs, values)
    return out


def assert_accurate(f: Forest, out, q, k, v, **options) -> None:
    """Error against float64 at most twice that of the same computation in q's dtype; every element is finite."""
    want = exact(f, q, k, v, **options)
    plain = exact(f, q, k, v, dtype=q.dtype, **options).double()
    assert torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} elements are not finite"
    ours, theirs = (out.double() - want).norm(), (plain - want).norm()
    assert ours <= 2 * theirs + 1e-6 * want.norm(), (
        f"error {ours / want.norm():.2e}, plain PyTorch's {theirs / want.norm():.2e}"
    )
