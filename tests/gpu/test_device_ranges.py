"""Rows that begin anywhere, and pages that are not resident: the GPU's layout is the CPU's."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.pager_cases import COSTS, check_equal

from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.device_pager import DeviceLayout, DevicePager
from flashcore_sglang.layout import CsrLayout, build_layout

pytestmark = pytest.mark.gpu


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
