"""Small cases of every GPU path, for compute-sanitizer (scripts/sanitize.sh). Results are only looked at for NaN: the
tests compare them.

    python tests/gpu/sanitize_cases.py [pager] [window] [decode] [extend]

Inputs are made on the CPU and copied, so that the tools see every byte that is initialised and few kernels but ours.
The workspaces are not initialised: nothing may be read that was not written.
"""

from __future__ import annotations

import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu.decode_cases import Level, forest
from gpu.extend_cases import Extend, batch, tree_mask
from unit.window_cases import check, random_case

from flashcore_sglang.config import SHARE_ALWAYS, GatherModel
from flashcore_sglang.device_pager import DevicePager
from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.gpu_decode import GpuDecode
from flashcore_sglang.gpu_extend import GpuExtend, Visible
from flashcore_sglang.reach import Reach

WIDE: tuple[Level, ...] = ((1, 320), (18, 40))  # 72 q_rows share
NARROW: tuple[Level, ...] = ((3, 200),)
SPLIT: tuple[Level, ...] = ((2, 1400),)
PARTS: tuple[Level, ...] = ((170, 21), (340, 150))  # each request's item: two runs that end anywhere
MANY: tuple[Level, ...] = ((4, 64), (320, 24))  # several items for every CTA, so that it uses its buffers again
TREE: tuple[Level, ...] = ((2, 256), ((3, 5), 128), (8, 33))


@dataclass
class Case:
    name: str
    requests: Any  # as for forest, for batch
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 1
    order: str = "runs"
    logit_cap: float = 0.0
    sinks: bool = False
    e4m3: bool = False  # the cache; with scales in device memory

    @property
    def kv_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.e4m3 else self.dtype


@dataclass
class DecodeCase(Case):
    lens: list[int] | None = None
    graph: bool = False


DECODE = (
    DecodeCase("wide", WIDE, order="interleaved"),
    DecodeCase("wide d64 fp16", WIDE, 64, torch.float16, order="permuted"),
    DecodeCase("wide d256, page 16, sinks", WIDE, 256, page_size=16, sinks=True),
    DecodeCase("narrow d64, page 64", NARROW, 64, page_size=64),
    DecodeCase("narrow, cap and sinks, an empty request", NARROW, logit_cap=20.0, sinks=True, lens=[0, 77, 200]),
    DecodeCase("narrow d256 fp16, permuted", NARROW, 256, torch.float16, order="permuted"),
    DecodeCase("split", SPLIT, order="fragmented"),
    DecodeCase("tree in a graph", TREE, graph=True),
    DecodeCase("many items", MANY, order="interleaved"),
    DecodeCase("many items, e4m3", MANY, order="interleaved", e4m3=True),
    DecodeCase("items of runs", PARTS),
    DecodeCase("items of tokens apart", ((340, 77),), order="interleaved"),
    DecodeCase("items of runs, e4m3", PARTS, e4m3=True),
    DecodeCase("items of runs d64", PARTS, 64),
    DecodeCase("items of runs d256 fp16", PARTS, 256, torch.float16),
    DecodeCase("apart", NARROW, order="interleaved"),
    DecodeCase("apart, e4m3", NARROW, order="interleaved", e4m3=True),
    DecodeCase("wide d64 fp16, e4m3", WIDE, 64, torch.float16, order="permuted", e4m3=True),
    DecodeCase("split d256, e4m3, cap and sinks", SPLIT, 256, e4m3=True, logit_cap=20.0, sinks=True),
)


@dataclass
class ExtendCase(Case):
    window_left: int = -1
    tree: bool = False
    gather: bool = False  # however few queries there are


EXTEND = (
    ExtendCase("prompts, one empty", [(0, [(0, 300), (0, 0), (70, 33)])]),
    ExtendCase("on a shared prefix, d64 fp16", [(256, [(0, 8)] * 9)], 64, torch.float16, order="permuted"),
    ExtendCase("cut into chunks, d256, page 16, sinks", [(0, [(2000, 5)])], 256, page_size=16, sinks=True),
    ExtendCase("window and cap", [(0, [(100, 200)])], order="interleaved", logit_cap=20.0, window_left=20),
    ExtendCase("trees of drafts", [(128, [(0, 7), (30, 9)])], tree=True),
    ExtendCase("gathered first", [(300, [(0, 8)] * 3), (0, [(0, 270)])], order="permuted", gather=True),
    ExtendCase("e4m3", [(256, [(0, 8)] * 9), (0, [(0, 300)])], order="permuted", e4m3=True),
    ExtendCase("e4m3 d64, converted first", [(300, [(0, 90)] * 2)], 64, order="permuted", gather=True, e4m3=True),
    ExtendCase("e4m3 d256 fp16", [(256, [(0, 90)])], 256, torch.float16, page_size=64, e4m3=True),
    ExtendCase("e4m3 d64, cap", [(0, [(700, 200)])], 64, page_size=16, logit_cap=20.0, e4m3=True),
)


def scales_of(case: Case, kv_heads: int) -> dict[str, torch.Tensor]:
    if not case.e4m3:
        return {}
    return {"k_scale": torch.tensor(0.5).cuda(), "v_scale": (torch.rand(kv_heads) + 0.5).cuda()}


def run_decode(case: DecodeCase) -> None:
    heads, kv_heads = 8, 2
    f = forest(case.requests, case.page_size, case.order, case.lens)
    decode = GpuDecode(
        page_size=case.page_size, num_pages=f.num_pages, max_rows=f.batch, max_tokens=f.table.shape[1],
        heads=heads, kv_heads=kv_heads, head_dim=case.head_dim, kv_dtype=case.kv_dtype,
    )  # fmt: skip
    decode._workspace = torch.empty_like(decode._workspace)
    q = torch.randn(f.batch, heads, case.head_dim).to(case.dtype).cuda()
    k, v = (torch.randn(f.num_slots, kv_heads, case.head_dim).to(case.kv_dtype).cuda() for _ in range(2))
    out = torch.full((f.batch, heads, case.head_dim), torch.nan, dtype=case.dtype).cuda()
    sinks = torch.randn(heads).cuda() if case.sinks else None
    scales = scales_of(case, kv_heads)
    tables = f.table.cuda(), torch.arange(1, f.batch + 1).cuda(), f.seq_lens.cuda()

    def step() -> None:
        decode.plan()
        decode.attend(q, k, v, out, scale=0.1, logit_cap=case.logit_cap, sinks=sinks, **scales)

    decode.snapshot(*tables)
    if case.graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        decode.snapshot(*tables)
        graph.replay()
    else:
        step()
    assert out.cpu().isfinite().all(), f"{case.name}: not finite"


def run_extend(case: ExtendCase) -> None:
    heads, kv_heads = 8, 2
    b = batch(case.requests, case.page_size, case.order)
    visible = Visible.MASKED if case.tree else Visible.CAUSAL
    always = GatherModel(mebibytes=2, max_page_size=32, rows_scattered=1, rows_boxed=1, rows_converted=1)
    extend = Extend(
        b, heads, kv_heads, case.head_dim, visible=visible, window_left=case.window_left, poison=False,
        kv_dtype=case.kv_dtype, gather=always if case.gather else None,
    )  # fmt: skip
    q = torch.randn(b.num_tokens, heads, case.head_dim).to(case.dtype).cuda()
    k, v = (torch.randn(b.num_slots, kv_heads, case.head_dim).to(case.kv_dtype).cuda() for _ in range(2))
    options = {
        "logit_cap": case.logit_cap,
        "sinks": torch.randn(heads).cuda() if case.sinks else None,
        "custom_mask": tree_mask(b).cuda() if case.tree else None,
        **scales_of(case, kv_heads),
    }
    extend.plan()
    for _ in range(2):  # the second finds the counters as the first leaves them
        out = extend(q, k, v, scale=0.1, **options)
    assert out.cpu().isfinite().all(), f"{case.name}: not finite"


def run_pager(page_size: int) -> None:
    """A rebuild, an append, the canonical arrays; rows with a start, and staging."""
    f = forest(TREE, page_size)
    sizes = {"max_rows": f.batch, "max_tokens": f.table.shape[1], "num_pages": f.num_pages, "cost_model": SHARE_ALWAYS}
    rows, table = torch.arange(1, f.batch + 1).cuda(), f.table.cuda()
    pager = DevicePager(page_size, canonical=True, **sizes)
    for length in (f.seq_lens - 1, f.seq_lens):
        pager.snapshot(table, rows, length.cuda())
        pager.build()
    layout = pager.layout(f.batch).to_cpu()
    assert layout.appended and layout.status[0] == 0
    half = f.batch // 2
    pager.snapshot_drafts(table, rows[:half], (f.seq_lens[:half] - 9).cuda(), 2, 4)
    for _ in range(3):
        pager.build()
        pager.row_ends[: 2 * half] += 1
    assert pager.layout(2 * half).to_cpu().status[0] == 0

    general = DevicePager(page_size, ranged=True, staging=True, **sizes)
    pages = (f.table[1:] // page_size).cuda()
    starts = torch.arange(f.batch) * 7
    resident = (torch.arange(f.num_pages) % 5 > 0).cuda()
    general.snapshot_ranges(pages, starts.cuda(), f.seq_lens.cuda())
    general.build(resident)
    staged = general.layout(f.batch).to_cpu()
    assert not staged.is_complete and staged.status[0] == 0


def run_window(page_size: int, reach: Reach) -> None:
    """Decode, then an extend whose rows begin anywhere in the table or are chunks."""
    heads, kv_heads, head_dim = 8, 2, 128
    b = batch([(0, [(500, 1), (130, 90), (0, 7), (64, 0), (0, 200)])], page_size, "interleaved")
    sizes = {"max_rows": 16, "max_tokens": b.table.shape[1], "num_pages": b.num_pages}
    window = DeviceWindow(page_size, reach=reach, max_queries=1, max_extend=b.num_tokens, device="cuda", **sizes)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    decode = GpuDecode(page_size=page_size, pager=window, **sizes, **shape)
    extend = GpuExtend(window, max_tokens=b.num_tokens, **shape)
    k, v = (torch.randn(b.num_slots, kv_heads, head_dim).bfloat16().cuda() for _ in range(2))
    q = torch.randn(b.num_tokens, heads, head_dim).bfloat16().cuda()
    tables = b.table.cuda(), b.indices.cuda(), b.seq_lens.cuda()
    slot_map = torch.arange(b.num_slots).cuda()

    window.snapshot(*tables, slot_map=slot_map)
    decode.use(b.rows)
    decode.plan()
    outs = [decode.attend(q[: b.rows].contiguous(), k, v, torch.zeros_like(q[: b.rows]), scale=0.1)]

    longest = int(b.q_lens.max())
    window.snapshot(*tables, q_lens=b.q_lens.cuda(), num_tokens=b.num_tokens, max_queries=longest, slot_map=slot_map)
    extend.use(window.num_rows)
    extend.plan(window.lens, window.q_lens, b.num_tokens, window_left=reach.left)
    outs.append(extend.attend(q, k, v, torch.zeros_like(q), scale=0.1))
    assert all(out.cpu().isfinite().all() for out in outs), f"window {reach}: not finite"


def run_window_tables(seed: int) -> None:
    """A step of any kind, with ids and lengths that are wrong."""
    case = random_case(seed)
    window = case.window("cuda")
    case.snapshot(window, "cuda")
    check(case, window)
    window.take_mask(case.mask().cuda())


def main() -> None:
    torch.manual_seed(0)
    wanted = sys.argv[1:] or ["pager", "window", "decode", "extend"]
    if "pager" in wanted:
        for page_size in (1, 16):
            run_pager(page_size)
    if "window" in wanted:
        for page_size, reach in ((1, Reach(100)), (16, Reach(100)), (16, Reach(chunk=64))):
            run_window(page_size, reach)
        for seed in range(12):
            run_window_tables(seed)
        print("window", flush=True)
    if "decode" in wanted:
        for case in DECODE:
            run_decode(case)
            print(case.name, flush=True)
    if "extend" in wanted:
        for extend_case in EXTEND:
            run_extend(extend_case)
            print(extend_case.name, flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
