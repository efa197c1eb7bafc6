"""Decode of one layer with a sliding window: ours beside FA3 on the same pages, in one run.

    python scripts/bench_window.py
    python scripts/bench_window.py --peers none

Captured in CUDA graphs, rounds interleaved, L2 flushed before every replay; the figure of a round is the median of its
replays. "ours" is attention plus 1/32 of "plan", the tables of the window and the work list, which a step makes once
for all layers with a window. 32 layers as in bench_decode; models in which only some have one differ: gpt-oss-120b has
18 of 36, Gemma-3-12B 40 of 48. "snapshot" is the tables alone, which a step makes outside of its CUDA graph. The launch
of one graph, "empty_graph_us", is in every figure. Results go to scripts/results/window.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import RESULTS, ROOT, Flusher, captured, empty_graph_us, machine, microseconds

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peers  # noqa: E402

from flashcore_sglang.device_window import DeviceWindow  # noqa: E402
from flashcore_sglang.gpu_decode import GpuDecode  # noqa: E402
from flashcore_sglang.reach import Reach  # noqa: E402

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 32
CASES = {"64 x 32768": (64, 32768), "256 x 8192": (256, 8192), "1 x 32768": (1, 32768)}


def slots(requests: int, tokens: int, page_size: int, permuted: bool) -> torch.Tensor:
    """[requests, tokens] int32, page 0 left free."""
    pages = 1 + (
        torch.randperm(requests * tokens // page_size) if permuted else torch.arange(requests * tokens // page_size)
    )
    table = pages.view(requests, -1, 1) * page_size + torch.arange(page_size)
    return table.flatten(1).int().cuda()


def measure(name: str, page_size: int, permuted: bool, window_left: int, args: argparse.Namespace) -> dict[str, Any]:
    requests, tokens = CASES[name]
    table = slots(requests, tokens, page_size, permuted)
    size = requests * tokens + page_size
    k, v = (torch.randn(size, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(requests, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out, lens = torch.empty_like(q), torch.full((requests,), tokens, dtype=torch.int32, device="cuda")
    rows = torch.arange(requests, device="cuda")
    shared: dict[str, Any] = {"max_rows": requests, "max_tokens": tokens, "num_pages": size // page_size}
    window = DeviceWindow(page_size, reach=Reach(window_left), max_queries=1, device="cuda", **shared)
    decode = GpuDecode(page_size=page_size, pager=window, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, **shared)

    slot_map = torch.arange(size, device="cuda") if args.translated else None

    def snapshot() -> None:
        window.snapshot(table, rows, lens, slot_map=slot_map)
        decode.use(requests)

    def plan() -> None:
        snapshot()
        decode.plan()

    plan()
    flush = Flusher()
    calls: dict[str, Callable[[], Any]] = {
        "attention": lambda: decode.attend(q, k, v, out, scale=DIM**-0.5),
        "plan": plan,
        "snapshot": snapshot,
    }
    if args.peers != "none":
        starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
        pages = (table[:, ::page_size] // page_size).contiguous()
        calls["fa3"] = peers.fa3_paged(q, k, v, page_size, pages, lens, starts, 1, window_left, num_splits=0)
    graphs = {call: captured(function) for call, function in calls.items()}
    times: dict[str, list[float]] = {call: [] for call in calls}
    for _ in range(args.rounds):
        for call, graph in graphs.items():
            times[call].append(microseconds(graph, flush, args.replays))
    us = {call: statistics.median(x) for call, x in times.items()}
    us["ours"] = us["attention"] + us["plan"] / LAYERS
    if "fa3" in us:
        got, want = calls["attention"]().float(), calls["fa3"]().float()
        us["largest_difference"] = (got - want).abs().max().item()
        us["ratio"] = us["fa3"] / us["ours"]
    return us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", choices=["fa3", "none"], default="fa3")
    parser.add_argument("--window", type=int, default=4095, help="positions seen before a token's own")
    parser.add_argument("--translated", action="store_true", help="through a map of slots, which is the identity")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "window.json")
    args = parser.parse_args()
    empty = empty_graph_us(Flusher(), 1)
    print(f"{torch.cuda.get_device_name()}; a graph of one empty kernel takes {empty:.1f} us", flush=True)
    results = []
    for name in CASES:
        for page_size, permuted in ((1, False), (1, True), (64, True)):
            us = measure(name, page_size, permuted, args.window, args)
            results.append({"case": name, "page_size": page_size, "permuted": permuted, **us})
            print(json.dumps(results[-1]), flush=True)
    record = {
        "machine": machine(), "window": args.window, "translated": args.translated, "empty_graph_us": empty,
        "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
