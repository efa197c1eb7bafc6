"""A round of drafts, one layer of attention in each step: what it takes, and what of it is planning.

    python scripts/bench_drafts.py --peers none

Microseconds of CUDA graphs, rounds interleaved, L2 flushed before every replay. "round" is the snapshot, the plans and
the attention of all steps; "plans" is the same without the attention, and "snapshot" the part of it that SGLang's graph
of a draft model leaves out; "attention" is that of the last step, as many times as there are steps. "fa3" is FA3's
attention in as many steps over each request's tokens, which its branches share; of the passes that SGLang makes of a
tree it is the first alone. Results go to scripts/results/drafts.json.
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
from timing import RESULTS, ROOT, Flusher, captured, machine, microseconds

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peers  # noqa: E402
from gpu.draft_cases import draft_attention  # noqa: E402

from flashcore_sglang.step import Drafts  # noqa: E402

HEADS, KV_HEADS, DIM, STEPS = 32, 8, 128, 4
CASES = [(64, 1, 8192, 256, 1), (64, 4, 8192, 256, 1), (64, 4, 8192, 256, 64), (64, 1, 0, 2048, 1), (4, 8, 2048, 64, 1)]
"""(requests, branches, shared tokens, own tokens, page size)"""


def tables(requests: int, shared: int, width: int, page_size: int) -> torch.Tensor:
    """[requests + 1, width] int32 slots; page 0 and row 0 are padding."""
    pages = 1 + torch.arange(requests * width // page_size).view(requests, -1, 1)
    slots = (pages * page_size + torch.arange(page_size)).flatten(1).int()
    slots[:, :shared] = slots[0, :shared].clone()
    return torch.cat([torch.zeros_like(slots[:1]), slots]).cuda()


def measure(case: tuple[int, int, int, int, int], args: argparse.Namespace) -> dict[str, float]:
    requests, branches, shared, own, page_size = case
    tokens = shared + own
    width = tokens + branches * 2 * max(page_size, STEPS)
    table = tables(requests, shared, width, page_size)
    attention = draft_attention(
        (HEADS, KV_HEADS, DIM), layers=1, branches=branches, steps=STEPS, page_size=page_size,
        num_pages=table.shape[0] * width // page_size, max_batch=table.shape[0], max_context=width,
    )  # fmt: skip
    shape = (table.shape[0] * width, KV_HEADS, DIM)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(requests * branches, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out, lens = torch.empty_like(q), torch.full((requests,), tokens, device="cuda")
    drafts = Drafts(torch.arange(1, requests + 1, device="cuda"), lens, branches, STEPS)

    def plans() -> None:
        for step in attention.snapshot_drafts(drafts, table):
            step.plan()

    def whole_round() -> None:
        for step in attention.snapshot_drafts(drafts, table):
            step.attend(0, q, k, v, out, scale=DIM**-0.5)

    def attend_last() -> None:
        assert attention.planned is not None
        for _ in range(STEPS - 1):
            attention.planned.attend(0, q, k, v, out, scale=DIM**-0.5)

    calls: dict[str, Callable[[], Any]] = {
        "snapshot": lambda: attention.snapshot_drafts(drafts, table),
        "round": whole_round,
        "plans": plans,
        "attention": attend_last,
    }
    if args.peers != "none":
        starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * branches
        pages = (table[1:, :tokens:page_size] // page_size).contiguous()
        fa3 = peers.fa3_paged(q, k, v, page_size, pages, lens.int(), starts, branches, num_splits=0)
        calls["fa3"] = lambda: [fa3() for _ in range(STEPS - 1)]
    flush, graphs = Flusher(), {}
    for name, call in calls.items():
        graphs[name] = captured(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, graph in graphs.items():
            times[name].append(microseconds(graph, flush, args.replays))
    return {name: statistics.median(x) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", choices=["fa3", "none"], default="fa3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "drafts.json")
    args = parser.parse_args()
    names, results = ("requests", "branches", "shared", "own", "page_size"), []
    for case in CASES:
        results.append({**dict(zip(names, case, strict=True)), **measure(case, args)})
        print(json.dumps(results[-1]), flush=True)
    args.out.write_text(json.dumps({"machine": machine(), "steps": STEPS - 1, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
