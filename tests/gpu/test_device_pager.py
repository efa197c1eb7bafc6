"""The pager on the GPU gives the CPU pager's layout, field by field and bit by bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.layout import CsrLayout, CsrPager, build_layout

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from flashcore_sglang.device_pager import DeviceLayout, DevicePager

pytestmark = pytest.mark.gpu

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


@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_random_forests_equal_the_cpu_pagers(page_size, cost):
    for seed in range(12):
        batch = random_batch(seed * 1000 + page_size, page_size, max_blocks=2500 if page_size == 1 else 300)
        want = cpu_pager(batch, cost).step(batch.table, batch.rows, batch.lens)
        check_equal(step(device_pager(batch, cost), batch).to_cpu(), want)


@pytest.mark.parametrize("page_size", [1, 64])
def test_batches_of_up_to_1024_rows_equal_the_cpu_pagers(page_size):
    for seed in range(6):
        batch = random_batch(seed, page_size, max_rows=1024, max_blocks=150)
        want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
        check_equal(step(device_pager(batch), batch).to_cpu(), want)


@pytest.mark.parametrize("shared", [0, 8000, 8192])
def test_256_requests_of_8192_tokens_equal_the_cpu_pagers(shared):
    table = torch.randperm(257 * 8192, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(257, 8192)
    table[1:, :shared] = table[1, :shared]
    batch = Batch(1, table, torch.randperm(256) + 1, torch.full((256,), 8192), 257 * 8192)
    want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
    check_equal(step(device_pager(batch), batch).to_cpu(), want)


def test_long_context_equals_the_cpu_pagers():
    table = torch.arange(5 * 140000, dtype=torch.int32).view(5, 140000)
    table[2:, :131072] = table[1, :131072]
    table[4, 100001] = 7
    batch = Batch(1, table, torch.tensor([1, 2, 3, 4, 0]), torch.tensor([140000, 131072, 131073, 139999, 1]), 700000)
    want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
    check_equal(step(device_pager(batch), batch).to_cpu(), want)


def mutate(batch: Batch, rng: random.Random) -> Batch:
    """What may happen between two steps: most often every request appends a token."""
    table, rows, lens = batch.table.clone(), batch.rows.clone(), batch.lens.clone()
    after = replace(batch, table=table, rows=rows, lens=lens)
    width, row = table.shape[1], rng.randrange(table.shape[0])
    event = rng.choice(["append"] * 6 + ["jump", "rewrite", "page", "swap", "shorten"])
    if event == "append":
        after.lens = (lens + 1).clamp(max=width)
    elif event == "jump":
        after.lens = (lens + rng.randrange(3 * batch.page_size)).clamp(max=width)
    elif event == "rewrite":  # the row is given to another request, which shares with some other row
        table[row] = table[rng.randrange(table.shape[0])]
        after.set_page(row, rng.randrange(width // batch.page_size), rng.randrange(batch.num_pages))
    elif event == "page":  # one page of a running request is replaced, its length grows as if nothing were
        after.set_page(row, rng.randrange(width // batch.page_size), rng.randrange(batch.num_pages))
        after.lens = (lens + 1).clamp(max=width)
    elif event == "swap":
        rows[rng.randrange(rows.numel())] = rng.randrange(table.shape[0])
    else:
        lens[rng.randrange(lens.numel())] = rng.randint(0, width)
    return after


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_step_after_step_equals_the_cpu_pagers(page_size):
    appended = 0
    for seed in range(10):
        batch, rng = random_batch(seed + 77, page_size, max_rows=24, tidy=seed % 3 != 0), random.Random(seed)
        pager, cpu = device_pager(batch, COSTS[seed % 4]), cpu_pager(batch, COSTS[seed % 4])
        for _ in range(12):
            want = cpu.step(batch.table, batch.rows, batch.lens)
            check_equal(step(pager, batch).to_cpu(), want)
            appended += want.appended
            batch = mutate(batch, rng)
    assert appended > 20


def test_a_batch_that_changes_size_equals_the_cpu_pagers():
    batch = random_batch(5, 1, max_rows=40)
    pager, cpu = device_pager(batch), cpu_pager(batch)
    for rows in (batch.rows.numel(), 1, batch.rows.numel() // 2 + 1, batch.rows.numel()):
        part = replace(batch, rows=batch.rows[:rows].clone(), lens=batch.lens[:rows].clone())
        check_equal(step(pager, part).to_cpu(), cpu.step(part.table, part.rows, part.lens))


def test_graph_replay_equals_eager():
    batch, rng = random_batch(3, 1, max_rows=32, tidy=True), random.Random(3)
    pager, eager = device_pager(batch), device_pager(batch)
    step(pager, batch)  # as SGLang: warmed up before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pager.build()
    step(eager, batch)
    for _ in range(10):
        batch = mutate(batch, rng)
        pager.snapshot(batch.table.cuda(), batch.rows.cuda(), batch.lens.cuda())
        graph.replay()
        check_equal(pager.layout(batch.rows.numel()).to_cpu(), step(eager, batch).to_cpu())


def test_a_second_build_of_one_snapshot_changes_nothing():
    for seed in range(8):
        batch = random_batch(seed, 1)
        pager = device_pager(batch)
        first = step(pager, batch).to_cpu()
        pager.build()
        second = pager.layout(batch.rows.numel()).to_cpu()
        check_equal(replace(second, appended=first.appended), first)


def test_two_runs_are_bitwise_equal():
    batch = random_batch(11, 1, max_rows=200, max_blocks=2000)
    pagers = [device_pager(batch) for _ in range(2)]
    for pager in pagers:
        step(pager, batch)
    assert torch.equal(pagers[0]._memory, pagers[1]._memory)


def test_the_snapshot_holds_the_pages_of_every_segment():
    for seed in range(8):
        batch = random_batch(seed + 31, (1, 16)[seed % 2])
        want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
        got = step(device_pager(batch, canonical=False), batch)
        segments = want.num_segments
        for name in ("row_order", "row_indptr"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name))
        for name in ("segment_rows", "segment_positions", "page_indptr", "row_segments"):
            assert torch.equal(getattr(got, name)[: getattr(want, name).shape[0]].cpu(), getattr(want, name))
        table, entries = got.table.cpu(), got.segment_entries[:segments].tolist()
        counts = (want.page_indptr[1:] - want.page_indptr[:-1]).tolist()
        pages = [table[at : at + n] for at, n in zip(entries, counts, strict=True)]
        assert torch.equal(torch.cat([*pages, torch.empty(0, dtype=torch.int32)]), want.page_indices)


def test_padding_rows_and_sharing_off_never_group():
    batch = random_batch(0, 1)
    batch.table[:] = batch.table[0]
    batch.lens[:] = batch.table.shape[1]
    for rows, sharing in ((torch.zeros_like(batch.rows), True), (torch.ones_like(batch.rows), False)):
        layout = step(device_pager(batch, sharing=sharing), replace(batch, rows=rows)).to_cpu()
        assert (layout.segment_rows[:, 1] - layout.segment_rows[:, 0] == 1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_integer_widths_are_read(dtype):
    batch = random_batch(9, 16)
    want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
    pager = device_pager(batch)
    pager.snapshot(batch.table.cuda(), batch.rows.to(dtype).cuda(), batch.lens.to(dtype).cuda())
    pager.build()
    check_equal(pager.layout(batch.rows.numel()).to_cpu(), want)


@pytest.mark.parametrize("page_size", [1, 64])
def test_out_of_range_input_is_cut_and_reported_as_by_the_cpu_pager(page_size):
    for seed in range(10):
        rng = random.Random(seed)
        batch = random_batch(seed + 500, page_size)
        row = rng.randrange(batch.rows.numel())
        if seed % 5 == 0:
            batch.rows[row] = rng.choice([-1, batch.table.shape[0], 2**40])
        elif seed % 5 == 1:
            batch.lens[row] = rng.choice([-1, -(2**40)])
        elif seed % 5 == 2:
            batch.lens[row] = batch.table.shape[1] + rng.choice([1, 2**20])
        else:
            position = rng.randrange(batch.table.shape[1])
            batch.table[:, position:] = rng.choice([-1, batch.num_pages * page_size, 2**31 - 1])
        want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
        pager = device_pager(batch)
        check_equal(step(pager, batch).to_cpu(), want)
        torch.cuda.synchronize()
        assert pager.violation() == (want.status if want.status[0] else None)
        assert pager.violation() is None


def test_arguments_that_do_not_fit_are_value_errors():
    batch = random_batch(1, 1)
    pager = device_pager(batch, canonical=False)
    table, rows, lens = batch.table.cuda(), batch.rows.cuda(), batch.lens.cuda()
    for message, arguments in (
        ("req_to_token: want a CUDA tensor", (batch.table, rows, lens)),
        (r"req_to_token: want \[pool, max_context\] int32", (table.long(), rows, lens)),
        (r"req_pool_indices: want contiguous \[B\]", (table, rows.float(), lens)),
        ("req_pool_indices: want .* entries", (table, rows.repeat(2), lens)),
        ("seq_lens: want 1 .. ", (table, rows.repeat(2), lens.repeat(2))),
    ):
        with pytest.raises(ValueError, match=message):
            pager.snapshot(*arguments)
    with pytest.raises(ValueError, match="layout: want one of a canonical pager"):
        step(pager, batch).to_cpu()
    with pytest.raises(ValueError, match=r"num_rows: want 1 \.\. "):
        pager.layout(0)
    for message, sizes in (
        ("max_rows: want 1 .. 1024, got 1025", {"max_rows": 1025}),
        ("page_size: want a power of two", {"page_size": 48}),
        ("num_pages: want 1 .. ", {"num_pages": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            DevicePager(**{"page_size": 1, "max_rows": 4, "max_tokens": 64, "num_pages": 8, **sizes})


@pytest.mark.parametrize("max_entries", [63 + 64 * 65 // 2, 64])
def test_more_entries_than_there_is_room_for_share_nothing(max_entries):
    """Row r agrees with row r + 1 on r + 1 tokens: nested groups of 64, 63 .. 2 rows, and 64 own parts."""
    rows = 64
    table = torch.arange(1, rows + 2, dtype=torch.int32).repeat(rows + 1, 1)
    for row in range(rows):
        table[row + 1, row + 1] = 1000 + row
    pager = DevicePager(
        1,
        max_rows=rows,
        max_tokens=rows + 1,
        num_pages=2000,
        cost_model=SHARE_ALWAYS,
        canonical=True,
        max_entries=max_entries,
    )
    lens = torch.arange(2, rows + 2)
    pager.snapshot(table.cuda(), torch.arange(1, rows + 1).cuda(), lens.cuda())
    pager.build()
    layout = pager.layout(rows).to_cpu()
    assert (layout.num_segments == rows) == (max_entries == 64)
    assert layout.row_segments.numel() <= max_entries
    assert layout.tokens_wanted == int(lens.sum())


@dataclass
class Ranges:
    """Arguments of ``build_layout``, on the CPU."""

    token_to_page: torch.Tensor
    seq_starts: torch.Tensor
    seq_ends: torch.Tensor
    page_tokens: int
    num_pages: int


def random_ranges(seed: int, page_size: int, *, max_rows: int = 40, max_blocks: int = 120) -> Ranges:
    """Rows that begin anywhere inside prefixes of earlier rows, inside pages too; some are empty."""
    rng = random.Random(seed)
    rows, blocks = rng.randint(1, max_rows), rng.randint(1, max_blocks)
    pages = torch.arange(1, rows * blocks + 1, dtype=torch.int32).view(rows, blocks)
    if seed % 4 == 1:
        pages = torch.randint(0, 3, (rows, blocks), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    for row in range(1, rows):
        shared, parent = rng.choice([0, blocks // 2, blocks, rng.randint(0, blocks)]), rng.randrange(row)
        pages[row, :shared] = pages[parent, :shared]
    width = blocks * page_size
    ends = [rng.choice([width, rng.randint(0, width)]) for _ in range(rows)]
    starts = [rng.choice([0, min(width // 2 + rng.randint(0, 1), end), rng.randint(0, end)]) for end in ends]
    per_page = pages.unsqueeze(-1).expand(-1, -1, page_size)
    return Ranges(
        per_page if seed % 2 else per_page.reshape(rows, width),
        torch.tensor(starts, dtype=torch.int32 if seed % 3 else torch.int64),
        torch.tensor(ends),
        page_size,
        rows * blocks + 1,
    )


def build_on(r: Ranges, device: str, resident: torch.Tensor | None, cost: CostModel) -> CsrLayout:
    table = r.token_to_page.cuda() if device == "cuda" else r.token_to_page
    if table.ndim == 3:  # .cuda() gives the repeated ids memory of their own
        table = table[:, :, :1].expand(-1, -1, r.page_tokens)
    bitmap = None if resident is None else resident.to(device)
    layout = build_layout(
        table, r.seq_starts.to(device), r.seq_ends.to(device), bitmap,
        page_tokens=r.page_tokens, num_pages=r.num_pages, cost_model=cost,
    )  # fmt: skip
    return layout.to_cpu() if isinstance(layout, DeviceLayout) else layout


def random_residency(seed: int, num_pages: int) -> torch.Tensor | None:
    """A bitmap of each of its forms: bool, uint8, packed int32; from nothing missing to everything."""
    generator = torch.Generator().manual_seed(seed)
    share = (0.9, 0.5, 0.0, 1.0)[seed % 4]
    resident = torch.rand(num_pages, generator=generator) < share
    if seed % 3 == 0:
        return resident
    if seed % 3 == 1:
        return resident.to(torch.uint8)
    bits = torch.zeros(-(-num_pages // 32) * 32, dtype=torch.int64)
    bits[:num_pages] = resident
    words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
    return (words - (words >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_rows_with_a_start_equal_the_cpu_pagers(page_size):
    for seed in range(24):
        ranges, cost = random_ranges(seed, page_size), COSTS[seed % 4]
        check_equal(build_on(ranges, "cuda", None, cost), build_on(ranges, "cpu", None, cost))


@pytest.mark.parametrize("page_size", [1, 64])
def test_1024_rows_with_a_start_equal_the_cpu_pagers(page_size):
    ranges = random_ranges(6, page_size, max_rows=1024, max_blocks=60)
    check_equal(build_on(ranges, "cuda", None, SHARE_ALWAYS), build_on(ranges, "cpu", None, SHARE_ALWAYS))


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_staging_equals_the_cpu_pagers(page_size):
    for seed in range(24):
        ranges, cost = random_ranges(seed + 100, page_size), COSTS[seed % 4]
        resident = random_residency(seed, ranges.num_pages)
        check_equal(build_on(ranges, "cuda", resident, cost), build_on(ranges, "cpu", resident, cost))


def test_staging_in_a_graph_follows_the_bitmap():
    ranges = random_ranges(3, 16, max_rows=30)
    rows = ranges.seq_ends.numel()
    pager = DevicePager(
        16, max_rows=rows, max_tokens=2048, num_pages=ranges.num_pages, cost_model=SHARE_ALWAYS, ranged=True,
        staging=True,
    )  # fmt: skip
    resident = torch.ones(ranges.num_pages, dtype=torch.bool, device="cuda")
    table = ranges.token_to_page.cuda()[:, :, :1].expand(-1, -1, 16)
    pager.snapshot_ranges(table, ranges.seq_starts.cuda(), ranges.seq_ends.cuda())
    pager.build(resident)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pager.build(resident)
    for seed in range(4):
        bitmap = torch.rand(ranges.num_pages, generator=torch.Generator().manual_seed(seed)) < seed / 3
        resident.copy_(bitmap)
        graph.replay()
        check_equal(pager.layout(rows).to_cpu(), build_on(ranges, "cpu", bitmap, SHARE_ALWAYS))


def test_ranges_that_violate_bounds_are_cut_and_reported():
    table = torch.arange(1, 65, dtype=torch.int32, device="cuda").view(2, 32)
    for starts, ends, page, status in (
        ([0, 5], [40, 20], None, (2, 0, 0, 40)),
        ([0, 9], [8, 7], None, (3, 1, 9, 7)),
        ([-2, 0], [8, 8], None, (3, 0, -2, 8)),
        ([0, 3], [9, 9], (1, 4), (1, 1, 4, 900)),
        ([0, 3], [9, 9], (1, 2), (0, 0, 0, 0)),  # before the row's start: never looked at
    ):
        bad = table.clone()
        if page:
            bad[page] = 900
        layout = build_layout(
            bad, torch.tensor(starts).cuda(), torch.tensor(ends).cuda(), page_tokens=1, num_pages=65,
        )  # fmt: skip
        assert layout.status.tolist() == list(status)
        assert int(layout.page_indices[: int(layout.sizes[1])].max()) < 65


def test_arguments_of_build_layout_on_the_gpu_that_do_not_fit_are_value_errors():
    r = random_ranges(3, 16)
    table, starts, ends = r.token_to_page.cuda()[:, :, :1].expand(-1, -1, 16), r.seq_starts.cuda(), r.seq_ends.cuda()
    resident = torch.ones(r.num_pages, dtype=torch.bool, device="cuda")
    good = {"page_tokens": 16, "num_pages": r.num_pages}
    for message, arguments, options in (
        ("token_to_page: want an int32 CUDA tensor", (table.long(), starts, ends), good),
        ("token_to_page: want last dimension 16", (table.contiguous(), starts, ends), good),
        ("seq_starts: want a CUDA tensor", (table, r.seq_starts, ends), good),
        (r"seq_ends: want contiguous \[B\] int32 or int64", (table, starts, ends.float()), good),
        ("seq_ends: want .* entries", (table, starts, ends[:-1].clone()), good),
        ("page_resident_bitmap: want a CUDA tensor", (table, starts, ends, resident.cpu()), good),
        ("page_resident_bitmap: want contiguous", (table, starts, ends, resident[:-1].clone()), good),
        ("page_resident_bitmap: want contiguous", (table, starts, ends, resident.float()), good),
        ("page_size: want a power of two", (table[:, :, :12], starts, ends), good | {"page_tokens": 12}),
        ("num_pages: want 1 .. ", (table, starts, ends), good | {"num_pages": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            build_layout(*arguments, **options)
    pager = DevicePager(16, max_rows=64, max_tokens=2048, num_pages=r.num_pages)
    with pytest.raises(ValueError, match="snapshot_ranges: want a pager made with ranged=True"):
        pager.snapshot_ranges(table, starts, ends)
    with pytest.raises(ValueError, match="page_resident_bitmap: want a pager made with staging=True"):
        pager.build(resident)
