"""The pager on the GPU gives the CPU pager's layout, field by field and bit by bit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.pager_cases import COSTS, Batch, check_equal, cpu_pager, device_pager, random_batch, slots_of, step

from flashcore_sglang.config import SHARE_ALWAYS
from flashcore_sglang.device_pager import DevicePager
from flashcore_sglang.step import Drafts

pytestmark = pytest.mark.gpu


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


def tree_batch(page_size: int, seed: int, *, broken: bool) -> Batch:
    """60 rows in groups of 20 and of 5. `broken`: some rows differ from their group in one block and agree after it."""
    rows, blocks = 60, 200
    pages = 1 + torch.randperm((rows + 1) * blocks, generator=torch.Generator().manual_seed(seed)).view(-1, blocks)
    for group, shared in ((5, 181), (20, 150), (60, 103)):
        leaders = torch.arange(rows) // group * group + 1
        pages[1:, :shared] = pages[leaders, :shared]
    num_pages = pages.numel() + 1 + rows
    if broken:
        pages[3::7, 33] = num_pages - 1 - torch.arange(len(pages[3::7])) // 2
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return Batch(page_size, slots_of(pages, page_size), order + 1, torch.full((rows,), blocks * page_size), num_pages)


@pytest.mark.parametrize("page_size", [1, 64])
def test_rebuilds_of_trees_equal_the_cpu_pagers(page_size):
    """Samples of the rows propose what to compare, if the last forest was a tree; broken trees are not as they say."""
    trees = [tree_batch(page_size, seed, broken=seed in (2, 3, 5)) for seed in range(8)]
    part = replace(trees[0], rows=trees[0].rows[:37].clone(), lens=trees[0].lens[:37] - 5 * page_size)
    pager, cpu = device_pager(trees[0]), cpu_pager(trees[0])
    for batch in (*trees, part, *trees):
        check_equal(step(pager, batch).to_cpu(), cpu.step(batch.table, batch.rows, batch.lens))


@pytest.mark.parametrize("rows_of_each", [0.1, 1, 2, 2.1])
@pytest.mark.parametrize("blocks", [3, 128, 132, 256, 257])
def test_short_rows_equal_the_cpu_pagers(rows_of_each, blocks):
    """All pairs are compared while no multiprocessor has more than two rows, and no row more than 256 pages."""
    rows = int(rows_of_each * torch.cuda.get_device_properties("cuda").multi_processor_count)
    generator = torch.Generator().manual_seed(rows * 1000 + blocks)
    pages = torch.randperm((rows + 1) * blocks, generator=generator).view(-1, blocks)
    for group, shared in ((2, blocks - 1), (9, blocks * 3 // 4), (rows, blocks // 2)):
        leaders = torch.arange(rows) // group * group + 1
        pages[1:, :shared] = pages[leaders, :shared]
    lens = torch.randint((blocks - 2) * 64, blocks * 64 + 1, (rows,), generator=generator)
    lens[::5] = blocks * 64
    order = torch.randperm(rows, generator=generator)
    batch = Batch(64, slots_of(pages, 64), order + 1, lens, pages.numel())
    for pages_equal in (False, True):  # the same pages altogether: rows part only where they end
        if pages_equal:
            batch.table[1:] = batch.table[1]
        want = cpu_pager(batch).step(batch.table, batch.rows, batch.lens)
        check_equal(step(device_pager(batch), batch).to_cpu(), want)


def test_a_batch_that_changes_size_equals_the_cpu_pagers():
    batch = random_batch(5, 1, max_rows=40)
    pager, cpu = device_pager(batch), cpu_pager(batch)
    for rows in (batch.rows.numel(), 1, batch.rows.numel() // 2 + 1, batch.rows.numel()):
        part = replace(batch, rows=batch.rows[:rows].clone(), lens=batch.lens[:rows].clone())
        check_equal(step(pager, part).to_cpu(), cpu.step(part.table, part.rows, part.lens))


@pytest.mark.parametrize("page_size", [1, 16])
def test_steps_of_drafts_equal_the_cpu_pagers(page_size):
    """Rounds of four steps in one to three branches; each step's rows have grown by a token."""
    for seed in range(9):
        batch, steps, branches = random_batch(seed + 900, page_size, tidy=True), 5, 1 + seed % 3
        pager = DevicePager(
            page_size,
            max_rows=branches * batch.rows.numel(),
            max_tokens=batch.table.shape[1],
            num_pages=batch.num_pages,
            cost_model=SHARE_ALWAYS,
            canonical=True,
        )
        cpu = cpu_pager(batch)
        for accepted in (0, 1, steps):
            batch.lens = batch.lens + accepted
            drafts = Drafts(batch.rows, batch.lens, branches, steps)
            table, rows = drafts.table(batch.table, page_size)
            pager.snapshot_drafts(batch.table.cuda(), batch.rows.cuda(), batch.lens.cuda(), branches, steps)
            for step_number, lens in enumerate(drafts.lens()):
                pager.row_ends[: drafts.num_rows] = lens.cuda()
                pager.build()
                got, want = pager.layout(drafts.num_rows).to_cpu(), cpu.step(table, rows, lens)
                assert got.appended or step_number == 0
                check_equal(replace(got, appended=want.appended), want)


def test_drafts_that_do_not_fit_are_value_errors():
    batch = random_batch(1, 1)
    table, rows, lens = batch.table.cuda(), batch.rows.cuda(), batch.lens.cuda()
    with pytest.raises(ValueError, match=r"branches: want 1 \.\. 1 for .* requests, got 2"):
        device_pager(batch).snapshot_drafts(table, rows, lens, 2, 3)
    with pytest.raises(ValueError, match=r"steps: want 1 \.\. 1024, got 0"):
        device_pager(batch).snapshot_drafts(table, rows, lens, 1, 0)


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
