"""The attention kernels' own source on an emulated machine (tests/emulator) against float64, without a GPU.

python -m pytest tests/unit/test_emulated_kernels.py
FLASHCORE_EMULATED_CSRC=../other/csrc python -m pytest tests/unit/test_emulated_kernels.py    # another tree's kernels
FLASHCORE_EMULATED_SEEDS=20 python -m pytest tests/unit/test_emulated_kernels.py              # more interleavings
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulator import library
from emulator.pager import HostPager
from gpu import extend_cases
from gpu.decode_cases import work_items
from gpu.extend_cases import Batch, Extend, assert_accurate, batch, exact, pools, tree_mask
from gpu.fp8_cases import E4M3, assert_close_to, e4m3_pools

from flashcore_sglang import build, gpu_decode, gpu_extend, reference
from flashcore_sglang.config import SHARE_ALWAYS, GatherModel
from flashcore_sglang.gpu_decode import GpuDecode
from flashcore_sglang.gpu_extend import Visible

if reason := library.missing():
    pytest.skip(reason, allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16
# Which warp goes on (0 any, 1 low numbers first, 2 high ones, 3 by priority), and when copies and products happen (0 at
# any time, 1 as early as they can, 2 as late as they can): emulator.cc.
SCHEDULES = [(0, 0), (0, 2), (1, 2), (2, 0), (3, 0), (3, 1), (3, 2)]
SEEDS = int(os.environ.get("FLASHCORE_EMULATED_SEEDS", "1"))
GATHER_NEVER = GatherModel(mebibytes=0, max_page_size=1, rows_scattered=1, rows_boxed=1, rows_converted=1)
GATHER_ALWAYS = GatherModel(mebibytes=4, max_page_size=64, rows_scattered=1, rows_boxed=1, rows_converted=1)
PARTIALS = 256


@dataclass(frozen=True)
class Case:
    """``groups``, ``page_size``, ``order``: of ``extend_cases.batch``. ``spread``: of q; large ones raise maxima."""

    groups: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    dtype: torch.dtype = BF16
    e4m3: bool = False
    page_size: int = 1
    order: str = "runs"
    visible: Visible = Visible.CAUSAL
    window_left: int = -1
    gather: GatherModel = GATHER_NEVER
    sinks: bool = False
    logit_cap: float = 0.0
    spread: float = 4.0
    multiprocessors: int = 2
    tail: bool = False
    """Whether some tiles are left over and cut into a range for each CTA."""


PREFIX = ((256, ((0, 8), (30, 50), (5, 1))), (0, ((200, 150), (0, 60))))
FEW = ((0, ((2500, 50), (2300, 40))),)
EVEN = ((0, ((2200, 8), (2100, 30)) * 7),)
ONES = ((256, ((5, 1),) * 20), (0, ((700, 1), (33, 1))))
EARLY = ((0, ((1500, 1), (900, 1), (256, 1), (257, 1))),)  # in runs, of few q_rows: their first tiles set out early
LONG = ((0, ((3000, 1), *((40, 1),) * 9)),)
CASES = {
    "one prompt": Case(((0, ((0, 200),)),), 1),
    "a long prompt": Case(((0, ((0, 700),)),), 2, 2),
    "a shared prefix": Case(PREFIX),
    "scattered tokens": Case(PREFIX, order="permuted"),
    "interleaved tokens": Case(PREFIX, 7, order="interleaved", sinks=True),
    "pages of 64": Case(((640, ((0, 9),) * 4), (0, ((0, 77), (100, 200)))), page_size=64, order="permuted"),
    "gathered": Case(((320, ((0, 40),) * 5), (0, ((0, 300),))), order="permuted", gather=GATHER_ALWAYS),
    "chunks": Case(FEW, 2, sinks=True, spread=1.0, multiprocessors=3),
    "chunks beside a prompt": Case(((0, ((0, 300), (2500, 70))),), 2, multiprocessors=3),
    "a tail": Case(EVEN, multiprocessors=3, sinks=True, spread=1.0, tail=True),
    "left over, but short": Case(((0, ((4600, 8),) * 2 + ((500, 8),) * 7),), head_dim=64),
    "a tail of scattered tokens": Case(EVEN, 2, 2, order="permuted", multiprocessors=5, tail=True),
    "a tail behind a prefix": Case(((1536, ((0, 32),) * 9),), multiprocessors=4, tail=True),
    "d 64, a tail": Case(EVEN, head_dim=64, multiprocessors=3, tail=True),
    "a window": Case(((0, ((500, 200), (0, 150))),), 2, 2, window_left=100),
    "all visible": Case(PREFIX, visible=Visible.ALL),
    "trees of drafts": Case(((256, ((0, 8),) * 6), (0, ((300, 16),))), order="interleaved", visible=Visible.MASKED),
    "logit cap": Case(PREFIX, logit_cap=20.0),
    "d 64": Case(PREFIX, head_dim=64, order="permuted"),
    "d 64, chunks": Case(FEW, 2, head_dim=64, multiprocessors=3),
    "d 256": Case(PREFIX, head_dim=256, order="permuted"),
    "fp16": Case(PREFIX, dtype=FP16),
    "e4m3": Case(PREFIX, e4m3=True, order="permuted"),
    "e4m3, d 64": Case(PREFIX, head_dim=64, e4m3=True),
    "e4m3, d 256": Case(PREFIX, head_dim=256, e4m3=True, dtype=FP16),
    "e4m3, converted first": Case(PREFIX, e4m3=True, order="permuted", gather=GATHER_ALWAYS),
}

DECODE_CASES = {
    "decode": Case(ONES),
    "decode, interleaved": Case(ONES, 7, order="interleaved", sinks=True, spread=1.0),
    "decode, permuted": Case(ONES, 8, 2, order="permuted", logit_cap=20.0),
    "decode, many tiles": Case(((0, ((900, 1), (500, 1), (1100, 1), (700, 1))),), 8, 2, multiprocessors=1),
    "decode, early tiles": Case(EARLY, multiprocessors=3),
    "decode, d 64, early tiles": Case(EARLY, head_dim=64, multiprocessors=3),
    "decode, d 256, early tiles": Case(EARLY, head_dim=256, multiprocessors=3),
    "decode, pages of 16, early tiles": Case(EARLY, 8, 2, page_size=16, multiprocessors=5),
    "decode, e4m3, early tiles": Case(EARLY, e4m3=True, multiprocessors=3),
    "decode, e4m3, d 64, early tiles": Case(EARLY, head_dim=64, e4m3=True, multiprocessors=3),
    "decode, e4m3, d 256, early tiles": Case(EARLY, head_dim=256, e4m3=True, multiprocessors=3),
    "decode, e4m3, two requests": Case(((0, ((1500, 1), (900, 1))),), e4m3=True, multiprocessors=2),
    "decode, long and short": Case(((0, ((3000, 1), (1700, 1), *((40, 1),) * 9)),), multiprocessors=2),
    "decode, many pieces": Case(LONG, multiprocessors=24, sinks=True, spread=1.0),
    "decode, many pieces, 63 heads on one": Case(LONG, 63, multiprocessors=24),
    "decode, pages of 16": Case(((256, ((5, 1),) * 20), (0, ((700, 1),))), page_size=16, order="permuted"),
    "decode, 64 heads on one": Case(ONES, 64),
    "decode, 20 heads on one": Case(ONES, 20),
    "decode, d 64": Case(ONES, head_dim=64, dtype=FP16),
    "decode, d 256": Case(ONES, head_dim=256, order="permuted"),
    "decode, d 256, runs": Case(ONES, head_dim=256),
    "decode, e4m3": Case(ONES, e4m3=True, order="interleaved"),
}


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    """The emulator in the place of the CUDA library."""
    real = build.library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "library", lambda kind="cuda": library.library() if kind == "cuda" else real(kind))
        for module in (gpu_extend, extend_cases):
            patch.setattr(module, "PARTIAL_CAPACITY", PARTIALS)
        patch.setattr(gpu_decode, "partial_capacity", lambda max_rows: PARTIALS)
        yield
    prepared.cache_clear()
    prepared_decode.cache_clear()


def aligned(size: int) -> torch.Tensor:
    """[size] bytes, zero, aligned as CUDA's allocator aligns."""
    memory = torch.zeros(size + 256, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 256 :][:size]


def inputs(case: Case) -> tuple[Batch, list[torch.Tensor], dict[str, Any]]:
    """The case's batch; its q, K and V; options."""
    torch.manual_seed(0)
    b = batch([(shared, list(requests)) for shared, requests in case.groups], case.page_size, case.order)
    shape = (case.kv_heads, case.head_dim)
    k, v = e4m3_pools(b.owned, *shape, device="cpu") if case.e4m3 else pools(b, *shape, case.dtype, "cpu")
    q = torch.randn(b.num_tokens, case.heads, case.head_dim, dtype=case.dtype) * case.spread
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "logit_cap": case.logit_cap}
    options["sinks"] = torch.randn(case.heads) + 5 if case.sinks else None  # of the weight of some hundred tokens
    if case.e4m3:
        options |= {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.9])}
    return b, [q, k, v], options


@functools.cache
def prepared(name: str) -> tuple[Extend, list[torch.Tensor], dict[str, Any], torch.Tensor]:
    """The case's kernels, their q, K and V, options, and what float64 says."""
    case = CASES[name]
    b, tensors, options = inputs(case)
    e = Extend(
        b, case.heads, case.kv_heads, case.head_dim, visible=case.visible, window_left=case.window_left,
        gather=case.gather, kv_dtype=E4M3 if case.e4m3 else case.dtype, device="cpu", pager_type=HostPager,
    )  # fmt: skip
    e.kernels._workspace = aligned(e.kernels._workspace.numel())
    options["custom_mask"] = tree_mask(b) if case.visible == Visible.MASKED else None
    return e, tensors, options, exact(e, *tensors, **options)


@functools.cache
def prepared_decode(name: str) -> tuple[GpuDecode, list[torch.Tensor], dict[str, Any], torch.Tensor]:
    case = DECODE_CASES[name]
    b, tensors, options = inputs(case)
    sizes = {"max_rows": b.rows, "max_tokens": b.table.shape[1], "num_pages": b.num_pages}
    pager = HostPager(b.page_size, cost_model=SHARE_ALWAYS, **sizes)
    pager.snapshot(b.table, b.indices, b.seq_lens)
    d = GpuDecode(
        page_size=b.page_size, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim,
        kv_dtype=E4M3 if case.e4m3 else case.dtype, pager=pager, device="cpu", **sizes,
    )  # fmt: skip
    d._workspace = aligned(d._workspace.numel())
    want = reference.extend(
        *tensors, b.table, b.indices, b.seq_lens, b.q_lens, page_size=b.page_size, **options
    )  # fmt: skip
    return d, tensors, options, want


def planned_attend(d: GpuDecode, q: torch.Tensor, *pools: torch.Tensor, **options: Any) -> torch.Tensor:
    """Schedule and attention, with nothing left of a run before."""
    d._workspace.zero_()
    d.plan()
    return d.attend(q, *pools, torch.full_like(q, torch.nan), **options)


def configure(case: Case, order: int, asynchrony: int, seed: int) -> None:
    library.library().emulator_configure(seed, order, asynchrony, case.multiprocessors)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("order, asynchrony", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_extend_is_exact_however_its_warps_interleave(name: str, order: int, asynchrony: int, seed: int) -> None:
    case = CASES[name]
    e, tensors, options, want = prepared(name)
    configure(case, order, asynchrony, seed)
    e.plan()
    out = e(*tensors, **options)
    assert (e.gathered_slots > 0) == (case.gather is GATHER_ALWAYS)
    assert (e.tail_ranges > 0) == case.tail
    if case.e4m3:
        assert_close_to(want, out, case.dtype if e.gathered_slots else FP16)
    else:
        assert_accurate(out, want)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("order, asynchrony", SCHEDULES)
@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_is_exact_however_its_warps_interleave(name: str, order: int, asynchrony: int, seed: int) -> None:
    case = DECODE_CASES[name]
    d, (q, k, v), options, want = prepared_decode(name)
    configure(case, order, asynchrony, seed)
    out = planned_attend(d, q, k, v, **options)
    if case.e4m3:
        assert_close_to(want, out)
    else:
        assert_accurate(out, want)


@pytest.mark.parametrize("seed", [108, *range(8)])
def test_no_lane_waits_for_an_early_tile_that_has_come_and_gone(seed: int) -> None:
    d, (q, k, v), options, want = prepared_decode("decode, e4m3, two requests")
    configure(DECODE_CASES["decode, e4m3, two requests"], 3, 0, seed)
    assert_close_to(want, planned_attend(d, q, k, v, **options))


@pytest.mark.parametrize("cut", [32, 128, 160, 224])
def test_first_tiles_that_are_no_run_are_looked_up(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    d, (q, k, v), options, want = prepared_decode("decode, early tiles")
    configure(DECODE_CASES["decode, early tiles"], 0, 0, 0)
    table = d._layout.table.clone()  # the order of a request's tokens does not matter
    table[cut : cut + 128], table[512:640] = table[512:640].clone(), table[cut : cut + 128].clone()
    monkeypatch.setattr(d, "_layout", dataclasses.replace(d._layout, table=table))
    assert_accurate(planned_attend(d, q, k, v, **options), want)


@pytest.mark.parametrize(
    "first, past_end",
    [(-(2**31), False), (-200, False), (-1, False), (-130, True), (5, True), (2**30, False), (2**31 - 257, False)],
)
def test_first_tiles_outside_the_pool_are_its_last_slot(
    first: int, past_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, (q, k, v), options, _ = prepared_decode("decode, early tiles")
    configure(DECODE_CASES["decode, early tiles"], 0, 0, 0)
    outs = []
    for clamped in (False, True):
        table = d._layout.table.clone()
        table[:256] = first + past_end * len(k) + torch.arange(256)
        if clamped:
            table[(table < 0) | (table >= len(k))] = len(k) - 1
        with monkeypatch.context() as patch:
            patch.setattr(d, "_layout", dataclasses.replace(d._layout, table=table))
            outs.append(planned_attend(d, q, k.nan_to_num(), v.nan_to_num(), **options))
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


def test_only_small_items_lie_behind_the_large_ones() -> None:
    case = DECODE_CASES["decode, long and short"]
    d, *_ = prepared_decode("decode, long and short")
    configure(case, 0, 0, 0)
    d._workspace.zero_()
    d.plan()
    words = d._workspace[:64].view(torch.int32).tolist()
    items = work_items(d._workspace, d.num_tokens, d._segments, d._partials, case.heads // case.kv_heads)
    wide, large = words[2], words[6]  # ScheduleHeader
    assert not wide
    assert 0 < large < len(items)
    assert items[large - 1, 5] > 256
    assert items[large:, 5].max() <= 256


@pytest.mark.parametrize("exponent", [-math.inf, -60, 100])
def test_partial_results_of_decode_hold_values_of_any_size(exponent: float) -> None:
    d, (q, k, v), options, _ = prepared_decode("decode")
    configure(DECODE_CASES["decode"], 0, 0, 0)
    d._workspace.zero_()
    d.plan()
    want, out = (d.attend(q, k, x, torch.empty_like(q), **options) for x in (v, v * 2.0**exponent))
    assert torch.equal(out, want * 2.0**exponent)
