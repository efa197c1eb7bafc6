"""Decode attention of one layer: ours beside FA3 and FlashInfer on the same physical pages, in one run.

    python scripts/bench_decode.py                               # every case, page size 1, 32/8 heads, d 128, bf16
    python scripts/bench_decode.py --cases shared --order interleaved --page-size 64 --peers fa3
    python scripts/bench_decode.py --quick                       # four cases, two rounds
    python scripts/bench_decode.py --kv-dtype fp8_e4m3 --peers fa3   # FA3 casts q to e4m3 too, as SGLang does

Each contender is captured in a CUDA graph once per case; rounds are interleaved (ours, peer, ours, peer ...), the L2
is flushed before every replay, the figure of a round is the median of its replays and that of a case the median of its
rounds. The headline is attention plus 1/32 of the plan, which a step makes once for all layers: snapshot, pager and
work list after all rows have changed, on the GPU, on the same tables. `append` in the JSON is the plan of a step in
which rows only grew. Every figure has the launch of one graph in it.

Floors: unique KV bytes at the speed of a copy, measured in the run, and matrix products at 600 TFLOP/s. "of floor" is
the larger of them over ours. Ratios wanted in other orders: interleaved 90 %, permuted 80 % of those for runs where a
prefix is shared; where nothing is, parity (0.99) and 0.95. Cases whose shared parts are no whole pages are left out.
Results go to scripts/results/decode_<order>_p<page size>.json (_fp8_e4m3); scripts/chart.py draws them.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import RESULTS, ROOT, Flusher, captured, copy_gbps, empty_graph_us, machine, microseconds

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peers  # noqa: E402
from gpu.decode_cases import Forest, Level, forest  # noqa: E402

from flashcore_sglang.gpu_decode import GpuDecode  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
KV_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
LAYERS = 32
MAX_CONTEXT = 131072 + 4096
MMA_TFLOPS = 600
FLASHINFER_LEAST, PARITY = 2.0, 0.99


@dataclass(frozen=True)
class Case:
    """A tree of requests (``decode_cases.forest``), and the least FA3 / ours wanted with slots in runs; 0: none."""

    name: str
    levels: tuple[Level, ...]
    wanted: float = 0.0
    lens: tuple[int, ...] | None = None
    order: str | None = None  # instead of --order

    @property
    def shares(self) -> bool:
        return len(self.levels) > 1

    def fits(self, page_size: int) -> bool:
        """Whether what is shared is whole pages."""
        return all(tokens % page_size == 0 for _, tokens in self.levels[:-1])

    def wanted_in(self, order: str) -> float:
        if order in ("runs", "fragmented") or not self.wanted:
            return self.wanted
        if self.shares:
            return self.wanted * (0.9 if order == "interleaved" else 0.8)
        return PARITY if order == "interleaved" else 0.95

    def wanted_of_flashinfer(self, order: str) -> float:
        """Least (better of FlashInfer's two) / ours wanted: for one prefix and 64 requests or more, slots in runs."""
        requests = self.levels[-1][0]
        big = self.name.startswith("shared") and isinstance(requests, int) and requests >= 64
        return FLASHINFER_LEAST if big and order == "runs" else 0.0


def spread_lens(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths whose logarithms are spread evenly, in no order; the first is ``high``."""
    return tuple(round(high * (low / high) ** (i * 0.6180339887 % 1)) for i in range(count))


CASES = (
    Case("shared 16: 8192 + 512", ((1, 8192), (16, 512)), 2.5),
    Case("shared 64: 8192 + 512", ((1, 8192), (64, 512)), 4.5),
    Case("shared 256: 8192 + 256", ((1, 8192), (256, 256)), 8.0),
    Case("shared 256: 2048 + 256", ((1, 2048), (256, 256)), 3.0),
    Case("shared 1024: 2048 + 256", ((1, 2048), (1024, 256))),
    Case("shared 64: 32768 + 512", ((1, 32768), (64, 512)), 9.0),
    Case("shared 32: 90112 + 4096", ((1, 90112), (32, 4096)), 5.2),
    Case("dense 1 x 8192", ((1, 8192),), 1.6),
    Case("dense 1 x 131072", ((1, 131072),), 1.06),
    Case("dense 16 x 8192", ((16, 8192),), 1.04),
    Case("dense 128 x 2048", ((128, 2048),), 1.02),
    Case("dense 256 x 1024", ((256, 1024),), 1.02),
    Case("dense 64 x 8192", ((64, 8192),), PARITY),
    Case("dense 8 x 32768", ((8, 32768),), PARITY),
    Case("skewed 1 x 131072 + 31 x 4096", ((32, 131072),), PARITY, (131072, *[4096] * 31)),
    Case("mixed 8: 300 to 40000", ((8, 40000),), PARITY, (40000, 20000, 10000, 5000, 2500, 1200, 600, 300)),
    Case("mixed 64: 128 to 8192", ((64, 8192),), PARITY, spread_lens(64, 128, 8192)),
    Case("mixed 256: 128 to 4096", ((256, 4096),), PARITY, spread_lens(256, 128, 4096)),
    Case("tree 1,4,64", ((1, 1024), (4, 512), (64, 256)), 2.0),
    Case("tree 1,2,64", ((1, 1024), (2, 256), (64, 256)), 2.0),
    Case("tree 1,16,256", ((1, 4096), (16, 512), (256, 128)), 2.0),
    Case("tree 1,8,64,512", ((1, 2048), (8, 256), (64, 128), (512, 64)), 2.0),
    Case("tree 4,32,256,1024", ((4, 512), (32, 256), (256, 64), (1024, 32)), 2.0),
    Case("tree 8,256", ((8, 4096), (256, 256)), 3.8),
    Case("groups of 32, 16, 8, 4, 2, 1, 1", (((32, 16, 8, 4, 2, 1, 1), 4096), (64, 512))),
    Case("groups 16 x 4: 8192 + 512", ((16, 8192), (64, 512))),
    Case("uneven tree 1, 3, 7, 96", ((1, 2048), ((64, 24, 8), 1024), ((40, 20, 4, 16, 8, 7, 1), 512), (96, 128))),
    # Near the threshold of sharing (configs/cost_model.json).
    Case("near 450 over 64", ((1, 450), (8, 256), (64, 256))),
    Case("near 700 over 32", ((1, 700), (4, 1024), (32, 256))),
    Case("near 440 over 2", ((128, 440), (256, 128))),
    Case("near 180 over 4", ((64, 180), (256, 64))),
    Case("fragmented 64: 8192 + 512", ((1, 8192), (64, 512)), order="fragmented"),
    Case("fragmented dense 64 x 8192", ((64, 8192),), order="fragmented"),
)
QUICK = ("shared 64: 8192 + 512", "dense 1 x 8192", "dense 128 x 2048", "tree 1,8,64,512")


class Ours:
    """The GPU path on a case, as the backend runs it; its graphs, and what its layout reads."""

    def __init__(self, f: Forest, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        decode = GpuDecode(
            page_size=f.page_size, num_pages=f.num_pages, max_rows=f.batch, max_tokens=int(f.seq_lens.max()),
            heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, kv_dtype=k.dtype,
        )  # fmt: skip
        rows, lens, table = torch.arange(1, f.batch + 1, device="cuda"), f.seq_lens.cuda(), f.table.cuda()
        mirrored = torch.zeros_like(table)  # every page id is another one, and the tree is the same
        mirrored[1:] = (f.num_pages - table[1:] // f.page_size) * f.page_size + table[1:] % f.page_size
        self.out = torch.empty_like(q)

        def plan(req_to_token: torch.Tensor) -> Callable[[], None]:
            def run() -> None:
                decode.snapshot(req_to_token, rows, lens)
                decode.plan()

            return run

        self._plans = [captured(plan(t)) for t in (mirrored, table)]
        self._attention = captured(lambda: decode.attend(q, k, v, self.out, scale=HEAD_DIM**-0.5))
        self._keep = (decode, rows, lens, table, mirrored)
        layout = decode.pager.layout(f.batch)
        self.segments = int(layout.sizes[0])
        readers, tokens = (
            (x[: self.segments, 1] - x[: self.segments, 0]).cpu().long()
            for x in (layout.segment_rows, layout.segment_positions)
        )
        self.tokens_stored, self.tokens_wanted = int(tokens.sum()), int((readers * tokens).sum())
        self.mebibytes = decode.mebibytes
        self.token_bytes = KV_HEADS * HEAD_DIM * 2 * k.element_size()

    def measure(self, flush: Callable[[], None], replays: int) -> dict[str, float]:
        """Microseconds of a round. The plan of the true table is the last, so that attention reads it."""
        return {
            "plan": microseconds(self._plans, flush, replays + replays % 2),
            "append": microseconds(self._plans[1:], flush, replays),
            "attention": microseconds(self._attention, flush, replays),
        }


def difference(theirs: Any, ours: torch.Tensor) -> float:
    """Relative distance of two outputs."""
    x = (theirs[0] if isinstance(theirs, tuple) else theirs).view_as(ours).float()
    return float((x - ours.float()).norm() / x.norm())


def run_case(case: Case, args: argparse.Namespace, flush: Callable[[], None]) -> dict[str, Any]:
    order = case.order or args.order
    f = forest(case.levels, args.page_size, order, None if case.lens is None else list(case.lens))
    q = torch.randn(f.batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(f.num_slots, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (x.to(KV_DTYPES[args.kv_dtype]) for x in (k, v))
    ours = Ours(f, q, k, v)
    ours.measure(flush, 1)
    result: dict[str, Any] = {"case": case.name, "order": order}
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "fa3": lambda: peers.fa3(f, q, k, v, MAX_CONTEXT),
        "decode": lambda: peers.flashinfer_decode(f, q, k, v),
    }
    if case.shares:
        makers["cascade"] = lambda: peers.flashinfer_cascade(f, case.levels, q, k, v)
    contenders: dict[str, torch.cuda.CUDAGraph] = {}
    calls = []  # own the buffers that the graphs use
    for peer in [p for p in args.peers.split(",") if p in makers]:
        try:
            call = makers[peer]()
            result[f"{peer}_difference"] = difference(call(), ours.out)
            contenders[peer] = captured(call)
            calls.append(call)
        except Exception as error:  # a peer that cannot run must not lose the others' figures
            result[f"{peer}_error"] = f"{type(error).__name__}: {error}"[:300]
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        of_peers = {peer: microseconds(graph, flush, args.replays) for peer, graph in contenders.items()}
        rounds.append(ours.measure(flush, args.replays) | of_peers)
    us = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return result | {"us": us, "rounds": rounds} | figures(case, order, ours, us, args.copy_gbps)


def figures(case: Case, order: str, ours: Ours, us: dict[str, float], copy: float) -> dict[str, Any]:
    """What follows from the times."""
    total = us["attention"] + us["plan"] / LAYERS
    flops = ours.tokens_wanted * HEADS * HEAD_DIM * 4
    floors = {
        "bytes_floor_us": ours.tokens_stored * ours.token_bytes / copy / 1e3,
        "mma_floor_us": flops / MMA_TFLOPS / 1e6,
    }
    ratio = us["fa3"] / total if "fa3" in us else None
    flashinfer = [us[p] for p in ("decode", "cascade") if p in us]
    of_flashinfer = min(flashinfer) / total if flashinfer else None
    wanted, wanted_of_flashinfer = case.wanted_in(order), case.wanted_of_flashinfer(order)
    verdicts = [r >= w for r, w in ((ratio, wanted), (of_flashinfer, wanted_of_flashinfer)) if r is not None and w]
    return floors | {
        "ours_us": total,
        "attention_us": us["attention"],
        "plan_us": us["plan"],
        "segments": ours.segments,
        "gbps": ours.tokens_stored * ours.token_bytes / total / 1e3,
        "tflops": flops / total / 1e6,
        "percent_of_floor": 100 * max(floors.values()) / total,
        "ratio": ratio,
        "wanted_ratio": wanted or None,
        "flashinfer_ratio": of_flashinfer,
        "wanted_flashinfer_ratio": wanted_of_flashinfer or None,
        "pass": all(verdicts) if verdicts else None,
    }


HEADER = (
    f"{'case':31s}{'ours us':>9s}{'attn':>8s}{'plan':>7s}{'GB/s':>7s}{'TF/s':>6s}{'of floor':>9s}"
    f"{'fa3 us':>9s}{'ratio':>7s}{'want':>6s}{'':5s}{'fi decode':>10s}{'cascade':>9s}{'ratio':>7s}{'want':>6s}"
)


def line(r: dict[str, Any]) -> str:
    us = r["us"]
    number = lambda x, width, digits: f"{'' if x is None else f'{x:.{digits}f}':>{width}s}"  # noqa: E731
    verdict = "" if r["pass"] is None else "ok" if r["pass"] else "MISS"
    notes = [f"{p} differs by {r[f'{p}_difference']:.0e}" for p in us if r.get(f"{p}_difference", 0.0) > 0.01]
    notes += [f"{key.removesuffix('_error')} failed: {text[:60]}" for key, text in r.items() if key.endswith("_error")]
    return (
        f"{r['case']:31s}{r['ours_us']:9.1f}{r['attention_us']:8.1f}{r['plan_us']:7.1f}{r['gbps']:7.0f}"
        f"{r['tflops']:6.0f}{r['percent_of_floor']:8.0f}%{number(us.get('fa3'), 9, 1)}{number(r['ratio'], 7, 2)}"
        f"{number(r['wanted_ratio'], 6, 2)} {verdict:4s}{number(us.get('decode'), 10, 1)}"
        f"{number(us.get('cascade'), 9, 1)}{number(r['flashinfer_ratio'], 7, 2)}"
        f"{number(r['wanted_flashinfer_ratio'], 6, 1)}  {'; '.join(notes)}"
    )


def chosen(args: argparse.Namespace) -> list[Case]:
    wanted = [c.strip() for c in args.cases.split(";") if c.strip()]
    fitting = [c for c in CASES if c.fits(args.page_size)]
    if args.quick and not wanted:
        return [c for c in fitting if c.name in QUICK]
    return [c for c in fitting if not wanted or any(w in c.name for w in wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="parts of case names, separated by semicolons; default all")
    parser.add_argument("--order", default="runs", choices=("runs", "interleaved", "permuted"))
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--kv-dtype", default="bfloat16", choices=tuple(KV_DTYPES))
    parser.add_argument("--peers", default="fa3,decode,cascade", help="of fa3, decode, cascade; none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="four cases, two rounds of five replays")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.replays = 2, 5
    started, flush = time.perf_counter(), Flusher()
    args.copy_gbps = copy_gbps()
    empty = empty_graph_us(flush, 1)
    print(
        f"{torch.cuda.get_device_name()}, copy {args.copy_gbps:.0f} GB/s, page size {args.page_size}, "
        f"order {args.order}, KV {args.kv_dtype}; a graph of one empty kernel takes {empty:.1f} us\n{HEADER}",
        flush=True,
    )
    results = []
    for case in chosen(args):
        results.append(run_case(case, args, flush))
        print(line(results[-1]), flush=True)
    for kind in ("", "tree"):
        ratios = [r["ratio"] for r in results if r["ratio"] and r["case"].startswith(kind)]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"geometric mean of FA3 / ours, {kind or 'all cases'}: {mean:.2f}")
    print(f"{time.perf_counter() - started:.0f} s")
    record = machine() | {
        "copy_gbps": args.copy_gbps, "empty_graph_us": empty, "page_size": args.page_size, "order": args.order,
        "kv_dtype": args.kv_dtype,
        "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "cases": results,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    suffix = ("" if args.kv_dtype == "bfloat16" else f"_{args.kv_dtype}") + ("_quick" if args.quick else "")
    name = f"decode_{args.order}_p{args.page_size}{suffix}.json"
    (args.out / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
