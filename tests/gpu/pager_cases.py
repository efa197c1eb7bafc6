"""Batches as SGLang's tables hold them, both pagers on them, and the comparison of their layouts, for the GPU tests."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.device_pager import DeviceLayout, DevicePager
from flashcore_sglang.layout import CsrLayout, CsrPager

ARRAYS = ("row_order", "segment_rows", "segment_positions", "page_indptr", "page_indices", "run_indptr", "runs",
          "row_indptr", "row_segments", "staged_pages")  # fmt: skip
COSTS = (SHARE_ALWAYS, CostModel(1, 128, 64), CostModel(1, 8, 2), CostModel(3, 1, 1))
KINDS = ("runs", "interleaved", "shuffled", "alphabet", "equal", "chain")


@dataclass
class Batch:
    """SGLang's side of a step, on the CPU."""

    page_size: int
    table: torch.Tensor  # [pool, positions] int32 slots
    rows: torch.Tensor  # [B] int64
    lens: torch.Tensor  # [B] int64
    num_pages: int

    def set_page(self, row: int, block: int, page: int) -> None:
        at = slice(block * self.page_size, min((block + 1) * self.page_size, self.table.shape[1]))
        self.table[row, at] = page * self.page_size + torch.arange(at.stop - at.start, dtype=torch.int32)


def slots_of(pages: torch.Tensor, page_size: int) -> torch.Tensor:
    """[pool, blocks] pages to [pool, blocks * page_size] slots."""
    slots = pages[:, :, None] * page_size + torch.arange(page_size)
    return slots.flatten(1).to(torch.int32)


def random_batch(seed: int, page_size: int, *, max_rows: int = 40, max_blocks: int = 300, tidy: bool = False) -> Batch:
    """Rows that continue prefixes of earlier rows; `alphabet` and `equal` break what holds for a radix cache.

    `tidy`: as in a server in full swing, every request has tokens of its own.
    """
    rng = random.Random(seed)
    kind = rng.choice(KINDS[:3] if tidy else KINDS)
    num_rows, blocks = rng.randint(1, max_rows), rng.randint(max_blocks // 2 if tidy else 1, max_blocks)
    pool = num_rows + rng.randint(1, 4)
    own = torch.arange(pool * blocks).view(pool, blocks) + 1
    if kind == "interleaved":
        own = own.view(blocks, pool).t().contiguous()
    elif kind == "shuffled":
        own = torch.randperm(pool * blocks, generator=torch.Generator().manual_seed(seed)).view(pool, blocks) + 1
    elif kind == "alphabet":
        own = torch.randint(0, 3, (pool, blocks), generator=torch.Generator().manual_seed(seed))
    elif kind == "equal":
        own = torch.full((pool, blocks), 5)
    pages = own.clone()
    most = blocks // 2 if tidy else blocks
    cuts = [rng.randint(0, most) for _ in range(3)]
    for row in range(1, pool):
        shared = row * blocks // pool if kind == "chain" else rng.choice([0, *cuts, rng.randint(0, most)])
        parent = row - 1 if kind == "chain" else rng.randrange(row)
        pages[row, :shared] = pages[parent, :shared]
    width = blocks * page_size
    base = rng.randint(0, width)
    near = [max(0, min(width, base + rng.randint(-3, 3))) for _ in range(num_rows)]
    anywhere = [rng.choice([0, 1, width, rng.randint(0, width)]) for _ in range(num_rows)]
    rows = [rng.choice([0, rng.randrange(pool), 1 + i % (pool - 1)]) for i in range(num_rows)]
    if tidy:
        anywhere = near = [rng.randint(width // 2 + 1, width * 3 // 4) for _ in range(num_rows)]
        rows = rng.sample(range(1, pool), num_rows)
    return Batch(
        page_size,
        slots_of(pages, page_size),
        torch.tensor(rows),
        torch.tensor(rng.choice([near, anywhere])),
        pool * blocks + 6,
    )


def device_pager(
    batch: Batch, cost: CostModel = SHARE_ALWAYS, *, sharing: bool = True, canonical: bool = True
) -> DevicePager:
    return DevicePager(
        batch.page_size,
        max_rows=batch.rows.numel(),
        max_tokens=batch.table.shape[1],
        num_pages=batch.num_pages,
        cost_model=cost,
        sharing=sharing,
        canonical=canonical,
    )


def cpu_pager(batch: Batch, cost: CostModel = SHARE_ALWAYS, *, sharing: bool = True) -> CsrPager:
    return CsrPager(batch.page_size, num_pages=batch.num_pages, cost_model=cost, sharing=sharing)


def step(pager: DevicePager, batch: Batch) -> DeviceLayout:
    pager.snapshot(batch.table.cuda(), batch.rows.cuda(), batch.lens.cuda())
    pager.build()
    return pager.layout(batch.rows.numel())


def check_equal(got: CsrLayout, want: CsrLayout) -> None:
    assert got.status == want.status
    assert got.appended == want.appended
    for name in ARRAYS:
        a, b = getattr(got, name), getattr(want, name)
        assert a.shape == b.shape, f"{name}: want {list(b.shape)}, got {list(a.shape)}"
        assert torch.equal(a, b), f"{name}: first difference at {(a != b).nonzero()[0].tolist()}"
