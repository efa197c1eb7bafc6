"""The extend kernels' own source on an emulated machine (tests/emulator) against float64, without a GPU.

python -m pytest tests/unit/test_emulated_kernels.py
FLASHCORE_EMULATED_CSRC=../other/csrc python -m pytest tests/unit/test_emulated_kernels.py    # another tree's kernels
FLASHCORE_EMULATED_SEEDS=20 python -m pytest tests/unit/test_emulated_kernels.py              # more interleavings
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulator import library
from emulator.pager import HostPager
from gpu import extend_cases
from gpu.extend_cases import Extend, assert_accurate, batch, exact, pools, tree_mask
from gpu.fp8_cases import E4M3, assert_close_to, e4m3_pools

from flashcore_sglang import build, gpu_extend
from flashcore_sglang.config import GatherModel
from flashcore_sglang.gpu_extend import Visible
from flashcore_sglang.reference import scaled

if reason := library.missing():
    pytest.skip(reason, allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16
# Which warp goes on (0 any, 1 low numbers first, 2 high ones), when copies and products happen (0 at any time, 1 as
# early as they can, 2 as late as they can), and whether a warp's lanes go on apart: emulator.cc.
SCHEDULES = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 2, 0), (1, 2, 1), (2, 0, 1), (2, 2, 0)]
SEEDS = int(os.environ.get("FLASHCORE_EMULATED_SEEDS", "1"))
GATHER_NEVER = GatherModel(mebibytes=0, max_page_size=1, rows_scattered=1, rows_boxed=1, rows_converted=1)
GATHER_ALWAYS = GatherModel(mebibytes=4, max_page_size=64, rows_scattered=1, rows_boxed=1, rows_converted=1)
PARTIALS = 64


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
    together: bool = False  # a warp's lanes never go on apart


PREFIX = ((256, ((0, 8), (30, 50), (5, 1))), (0, ((200, 150), (0, 60))))
FEW = ((0, ((0, 300), (2500, 3))),)
CASES = {
    "one prompt": Case(((0, ((0, 200),)),), 1),
    "a long prompt": Case(((0, ((0, 700),)),), 2, 2),
    "a shared prefix": Case(PREFIX),
    "scattered tokens": Case(PREFIX, order="permuted"),
    "interleaved tokens": Case(PREFIX, 7, order="interleaved", sinks=True),
    "pages of 64": Case(((640, ((0, 9),) * 4), (0, ((0, 77), (100, 200)))), page_size=64, order="permuted"),
    "gathered": Case(((320, ((0, 40),) * 5), (0, ((0, 300),))), order="permuted", gather=GATHER_ALWAYS),
    "chunks": Case(FEW, 2, sinks=True, multiprocessors=3),
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
    # With a ring of two buffers, the lanes of a loader must not be a tile apart: one could miss a phase.
    "e4m3, d 256": Case(PREFIX, head_dim=256, e4m3=True, dtype=FP16, together=True),
    "e4m3, converted first": Case(PREFIX, e4m3=True, order="permuted", gather=GATHER_ALWAYS),
}


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    """The emulator in the place of the CUDA library."""
    real = build.library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "library", lambda kind="cuda": library.library() if kind == "cuda" else real(kind))
        for module in (gpu_extend, extend_cases):
            patch.setattr(module, "PARTIAL_CAPACITY", PARTIALS)
        yield
    prepared.cache_clear()


@functools.cache
def prepared(name: str) -> tuple[Extend, list[torch.Tensor], dict[str, Any], torch.Tensor]:
    """The case's kernels, their q, K and V, options, and what float64 says."""
    case = CASES[name]
    torch.manual_seed(0)
    b = batch([(shared, list(requests)) for shared, requests in case.groups], case.page_size, case.order)
    shape = (case.kv_heads, case.head_dim)
    k, v = e4m3_pools(b.owned, *shape, device="cpu") if case.e4m3 else pools(b, *shape, case.dtype, "cpu")
    q = torch.randn(b.num_tokens, case.heads, case.head_dim, dtype=case.dtype) * case.spread
    e = Extend(
        b, case.heads, *shape, visible=case.visible, window_left=case.window_left, gather=case.gather,
        kv_dtype=E4M3 if case.e4m3 else case.dtype, device="cpu", pager_type=HostPager,
    )  # fmt: skip
    size = e.kernels._workspace.numel()
    memory = torch.empty(size + 256, dtype=torch.uint8)  # aligned as CUDA's allocator aligns
    e.kernels._workspace = memory[-memory.data_ptr() % 256 :][:size]
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "logit_cap": case.logit_cap}
    options["sinks"] = torch.randn(case.heads) if case.sinks else None
    options["custom_mask"] = tree_mask(b) if case.visible == Visible.MASKED else None
    scales = {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.9])} if case.e4m3 else {}
    want = exact(e, q, scaled(k, scales.get("k_scale")), scaled(v, scales.get("v_scale")), **options)
    return e, [q, k, v], options | scales, want


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("order, asynchrony, apart", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_exact_however_their_warps_interleave(
    name: str, order: int, asynchrony: int, apart: int, seed: int
) -> None:
    case = CASES[name]
    e, tensors, options, want = prepared(name)
    library.library().emulator_configure(
        seed, order, asynchrony, int(apart and not case.together), case.multiprocessors
    )
    e.plan()
    out = e(*tensors, **options)
    assert (e.gathered_slots > 0) == (case.gather is GATHER_ALWAYS)
    if case.e4m3:
        assert_close_to(want, out, case.dtype if e.gathered_slots else FP16)
    else:
        assert_accurate(out, want)
