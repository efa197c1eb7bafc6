"""Measure when reading a common prefix together pays, and print the constants of configs/cost_model.json.

    python scripts/tune.py [--heads 9 --kv-heads 3 --head-dim 64]        # the CPU path

For groups of 2 to 16 requests and prefixes of 8 to 512 tokens, attention is timed with the prefix shared and with the
prefix read by each request. The shortest prefix that pays, L(rows), is fitted by the rule of the cost model,
L * (rows - 1) = segment_cost + rows * partial_cost, in units of one token read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from flashcore_sglang import ops
from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.layout import build_layout_from_slots

OWN_TOKENS = 64
ROWS = (2, 4, 8, 16)
LENGTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
NEVER = CostModel(segment_cost=2**30)


def seconds(rows: int, length: int, shape: tuple[int, int, int], rounds: int) -> tuple[float, float]:
    """Median time of one layer with the prefix shared, and with it read by each; the two take turns."""
    heads, kv_heads, dim = shape
    total = length + OWN_TOKENS
    table = torch.zeros(rows + 1, total, dtype=torch.int32)
    table[1:, :length] = torch.arange(1, length + 1)
    table[1:, length:] = length + 1 + torch.arange(rows * OWN_TOKENS).view(OWN_TOKENS, rows).T  # as decode leaves them
    lens = torch.full((rows,), total)
    k, v = torch.randn(2, length + rows * OWN_TOKENS + 1, kv_heads, dim)
    q = torch.randn(rows, heads, dim)
    plans = [
        ops.plan(build_layout_from_slots(table, torch.arange(1, rows + 1), lens, 1, cost_model=cost), lens)
        for cost in (SHARE_ALWAYS, NEVER)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for plan, out in zip(plans, times, strict=True):
            start = time.perf_counter()
            for _ in range(10):
                ops.attend(q, k, v, plan, scale=dim**-0.5)
            out.append((time.perf_counter() - start) / 10)
    return statistics.median(times[0]), statistics.median(times[1])


def break_even(rows: int, shape: tuple[int, int, int], rounds: int) -> int:
    """The shortest measured prefix from which on sharing is faster."""
    best = LENGTHS[-1]
    for length in reversed(LENGTHS):
        shared, each = seconds(rows, length, shape, rounds)
        print(f"{rows:3d} requests, {length:4d} tokens: shared {1e6 * shared:6.0f} us, each {1e6 * each:6.0f} us")
        if shared > each:
            break
        best = length
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    lengths = [break_even(n, (args.heads, args.kv_heads, args.head_dim), args.rounds) for n in ROWS]
    system = torch.tensor([[1.0, n] for n in ROWS])
    wanted = torch.tensor([[float(length * (n - 1))] for n, length in zip(ROWS, lengths, strict=True)])
    segment, partial = torch.linalg.lstsq(system, wanted).solution.flatten().tolist()
    print(f"break-even lengths for {ROWS} requests: {lengths}")
    costs = {"token_cost": 1, "segment_cost": max(0, round(segment)), "partial_cost": max(0, round(partial))}
    print('"cpu": ' + json.dumps(costs))


if __name__ == "__main__":
    main()
