"""Random decode and extend steps, repeated and compared bitwise; test_contention.py runs it in several processes.

python tests/gpu/contention.py SEED SECONDS
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch
from gpu.decode_cases import Decode, forest
from gpu.decode_cases import pools as decode_pools
from gpu.extend_cases import GATHER_ALWAYS, Extend, batch
from gpu.extend_cases import pools as extend_pools

REPEATS = 12
HEADS = [(32, 8), (7, 1), (16, 8)]
DIMS = [64, 128, 128, 256]
ORDERS = ["runs", "interleaved", "permuted"]


def extends() -> list[Callable[[], torch.Tensor]]:
    """The same batch with and without sharing, and with K and V gathered first."""
    groups = []
    for _ in range(random.choice([1, 2, 4])):
        rows = [
            (random.choice([0, 5, 128, 300, 2000]), random.choice([1, 8, 33, 129, 500]))
            for _ in range(random.choice([1, 3, 9, 40]))
        ]
        groups.append((random.choice([0, 64, 304, 2048]), rows))
    (heads, kv_heads), dim = random.choice(HEADS), random.choice(DIMS)
    b = batch(groups, random.choice([1, 16]), random.choice(ORDERS), random.randrange(1000))
    k, v = extend_pools(b, kv_heads, dim, torch.bfloat16)
    q = torch.randn(b.num_tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    steps = []
    for sharing, gather in ((True, None), (False, None), (True, GATHER_ALWAYS)):
        e = Extend(b, heads, kv_heads, dim, sharing=sharing, gather=gather)
        e.plan()
        steps.append(lambda e=e: e(q, k, v, scale=0.1))
    return steps


def decodes() -> list[Callable[[], torch.Tensor]]:
    """A forest of random levels."""
    rows = random.choice([1, 7, 40, 130])
    levels = [(rows, random.choice([64, 300, 1000]))]
    if rows > 1:
        levels.insert(0, (random.choice([1, 2]), random.choice([256, 2048])))
    f = forest(levels, random.choice([1, 16]), random.choice(ORDERS))
    (heads, kv_heads), dim = random.choice(HEADS), random.choice(DIMS)
    k, v = decode_pools(f, kv_heads, dim, torch.bfloat16)
    q = torch.randn(f.batch, heads, dim, device="cuda", dtype=torch.bfloat16)
    d = Decode(f.layout(), heads, kv_heads, dim)
    return [lambda: d(q, k, v, scale=0.1)]


def main(seed: int, seconds: float) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    end, runs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for make in (extends, decodes):
            steps = make()
            first = [step().clone() for step in steps]
            for repeat in range(REPEATS):
                for i, step in enumerate(steps):
                    out = step()
                    runs += 1
                    if not torch.equal(out, first[i]):
                        sys.exit(f"{make.__name__}: variant {i}, repeat {repeat}, run {runs}: another result")
    print(f"seed {seed}: {runs} runs, each the same")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
