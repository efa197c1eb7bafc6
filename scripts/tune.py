"""Measure when reading a common prefix together pays, and print constants for configs/cost_model.json.

    python scripts/tune.py [--heads 9 --kv-heads 3 --head-dim 64]        # the CPU path
    python scripts/tune.py --device cuda                                 # Hopper; 32 query heads on 8 KV heads of 128

For groups of 2 to 16 requests and prefixes of 8 to 512 tokens, attention is timed with the prefix shared and with the
prefix read by each request. The shortest prefix that pays, L(rows), is fitted by the rule of the cost model,
L * (rows - 1) = segment_cost + rows * partial_cost, in units of one token read. On the CPU there is one group; on the
GPU 256 requests in as many groups as they make, up to 64 requests a group, so that the card is full, and the L2 is
flushed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import ROOT, Flusher, captured, microseconds

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flashcore_sglang import ops  # noqa: E402
from flashcore_sglang.config import SHARE_ALWAYS, CostModel  # noqa: E402
from flashcore_sglang.layout import build_layout_from_slots  # noqa: E402

NEVER = CostModel(segment_cost=2**30)
CPU_OWN_TOKENS, GPU_REQUESTS = 64, 256
# Of all residues of the kernel's 128-token tiles, so that no prefix gains by making rows end with a tile.
GPU_OWN_TOKENS = [64 + 37 * i % 128 for i in range(GPU_REQUESTS)]
LENGTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Shape = tuple[int, int, int]  # heads, kv_heads, head_dim
Timer = Callable[[], float]  # seconds of one layer


def cpu_timers(rows: int, length: int, shape: Shape) -> list[Timer]:
    """One group of requests: with the prefix shared, and with it read by each."""
    heads, kv_heads, dim = shape
    total = length + CPU_OWN_TOKENS
    table = torch.zeros(rows + 1, total, dtype=torch.int32)
    table[1:, :length] = torch.arange(1, length + 1)
    table[1:, length:] = length + 1 + torch.arange(rows * CPU_OWN_TOKENS).view(CPU_OWN_TOKENS, rows).T  # decode's order
    lens = torch.full((rows,), total)
    k, v = torch.randn(2, length + rows * CPU_OWN_TOKENS + 1, kv_heads, dim)
    q = torch.randn(rows, heads, dim)

    def timer(cost: CostModel) -> Timer:
        plan = ops.plan(build_layout_from_slots(table, torch.arange(1, rows + 1), lens, 1, cost_model=cost), lens)

        def run() -> float:
            start = time.perf_counter()
            for _ in range(10):
                ops.attend(q, k, v, plan, scale=dim**-0.5)
            return (time.perf_counter() - start) / 10

        return run

    return [timer(cost) for cost in (SHARE_ALWAYS, NEVER)]


@dataclass
class GpuTimer:
    """Replays of a layer; `layer` owns the buffers that the graph uses."""

    layer: Callable[[], None]
    graph: torch.cuda.CUDAGraph
    flush: Flusher

    def __call__(self) -> float:
        return microseconds(self.graph, self.flush, 5) / 1e6


def gpu_timers(rows: int, length: int, shape: Shape, flush: Flusher) -> list[Timer]:
    """As many groups as fill the card."""
    from gpu.decode_cases import Decode, forest

    heads, kv_heads, dim = shape
    levels = ((GPU_REQUESTS // rows, length), (GPU_REQUESTS, max(GPU_OWN_TOKENS)))
    f = forest(levels, order="interleaved", lens=GPU_OWN_TOKENS)
    q = torch.randn(f.batch, heads, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(f.num_slots, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def timer(cost: CostModel) -> Timer:
        decode, out = Decode(f.layout(cost), heads, kv_heads, dim), torch.empty_like(q)
        decode.schedule()

        def layer() -> None:
            decode.run(q, k, v, out, scale=dim**-0.5)

        return GpuTimer(layer, captured(layer), flush)

    return [timer(cost) for cost in (SHARE_ALWAYS, NEVER)]


def break_even(rows: int, timers: Callable[[int, int], list[Timer]], rounds: int) -> int:
    """The shortest measured prefix from which on sharing is faster."""
    best = LENGTHS[-1]
    for length in reversed(LENGTHS):
        pair = timers(rows, length)
        times = [[timer() for timer in pair] for _ in range(rounds)]  # the two take turns
        shared, each = (statistics.median(t) for t in zip(*times, strict=True))
        print(f"{rows:3d} requests, {length:4d} tokens: shared {1e6 * shared:7.1f} us, each {1e6 * each:7.1f} us")
        if shared > each:
            break
        best = length
    return best


def fit(rows: tuple[int, ...], lengths: list[int]) -> CostModel:
    """Least squares of relative errors, so that long prefixes do not decide for short ones."""
    saved = torch.tensor([float(length * (n - 1)) for n, length in zip(rows, lengths, strict=True)])
    system = torch.tensor([[1.0, n] for n in rows]) / saved[:, None]
    segment, partial = torch.linalg.lstsq(system, torch.ones(len(rows), 1)).solution.flatten().tolist()
    return CostModel(1, max(0, round(segment)), max(0, round(partial)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--heads", type=int, help="default: 9 on a CPU, 32 on a GPU")
    parser.add_argument("--kv-heads", type=int, help="default: 3, 8")
    parser.add_argument("--head-dim", type=int, help="default: 64, 128")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    defaults = (32, 8, 128) if on_gpu else (9, 3, 64)
    shape = (args.heads or defaults[0], args.kv_heads or defaults[1], args.head_dim or defaults[2])
    flush = Flusher() if on_gpu else None

    def timers(rows: int, length: int) -> list[Timer]:
        return cpu_timers(rows, length, shape) if flush is None else gpu_timers(rows, length, shape, flush)

    rows = (2, 4, 8, 16, 64) if on_gpu else (2, 4, 8, 16)
    lengths = [break_even(n, timers, args.rounds) for n in rows]
    costs = fit(rows, lengths)
    print(f"break-even lengths for {rows} requests: {lengths}")
    print(f'"{"hopper" if on_gpu else "cpu"}": ' + json.dumps(vars(costs)))


if __name__ == "__main__":
    main()
