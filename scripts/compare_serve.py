"""Greedy answers of a real model under several backends: equal texts, and the drift of their logprobs.

    python scripts/compare_serve.py --model-path ...                               # ours beside FA3's and others
    python scripts/compare_serve.py --model-path ... --backends torch_native flashcore_sparse \\
        --server-args "--device cpu --dtype float32"

The servers run at the same time on one GPU and get the same requests, all at once: groups that share a prefix and
requests that share nothing. bf16 sums in another order, so texts may part; logprobs are compared up to there. What FA3
and FlashInfer differ by is the measure for ours. "alone" is a backend with one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_serve import BACKENDS
from serving import Answer, Server, drift, encode, running, send_all, stop_servers_on_sigterm

GROUPS = ((16, 700), (8, 300), (4, 1500), (16, 0))
"""(requests, tokens they share)"""
UNSHARED = "ours-unshared"
TEXT = (
    "The sea covers most of the planet and most of it has never been seen. People who live beside it learn to read the "
    "wind, the colour of the water and the flight of birds. A fisherman once told a story about a storm that lasted "
    "for nine days. On the tenth morning the water was flat, and the town counted its boats. "
)


def prompts(tokenizer: Any, seed: int = 0) -> list[list[int]]:
    """Token ids of sentences in random order: text, so that the model is sure of some tokens and not of others."""
    generator = random.Random(seed)
    sentences = [tokenizer.encode(s + ". ").ids for s in TEXT.split(". ")]

    def take(count: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += generator.choice(sentences)
        return tokens[:count]

    return [shared + take(generator.randrange(8, 120)) for n, s in GROUPS for shared in [take(s)] for _ in range(n)]


def compare(mine: list[Answer], other: list[Answer]) -> dict[str, float]:
    """Requests answered alike, and the drift of the logprobs of the common tokens."""
    drifts = [d for a, b in zip(mine, other, strict=True) for d in drift(a, b)]
    return {
        "equal": sum(a.output_ids == b.output_ids for a, b in zip(mine, other, strict=True)),
        "of": len(mine),
        "tokens": len(drifts),
        "drift_max": max(drifts, default=0.0),
        "drift_mean": statistics.fmean(drifts) if drifts else 0.0,
    }


def answers(server: Server, bodies: list[bytes], at_once: int | None) -> list[Answer]:
    """Twice: the first time fills the radix cache. Raises RuntimeError if a request fails."""
    for _ in range(2):
        out = asyncio.run(send_all(server.url, bodies, at_once))
        if errors := [a.error for a in out if a.error]:
            raise RuntimeError(f"{len(errors)} requests failed on {server.url}, the first with: {errors[0]}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="with its tokenizer.json")
    parser.add_argument("--backends", nargs="+", default=["fa3", "ours", UNSHARED, "flashinfer"])
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--server-args", default="", help="more arguments for every server, in one string")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="folder of the JSON and the logs")
    args = parser.parse_args()
    stop_servers_on_sigterm()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.model_path) / "tokenizer.json"))
    bodies = [encode(p, args.output_tokens, return_logprob=True) for p in prompts(tokenizer)]
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Server:
            arguments = ["--model-path", args.model_path, "--skip-tokenizer-init", "--max-total-tokens", "60000"]
            arguments += BACKENDS.get(name.removesuffix("-unshared"), ["--attention-backend", name])
            log = Path(args.out) / f"compare_{name}.log"
            env = {"FLASHCORE_SHARING": "0"} if name == UNSHARED else {}
            return stack.enter_context(running([*arguments, *args.server_args.split()], log, **env))

        with ThreadPoolExecutor() as pool:
            servers = dict(zip(args.backends, pool.map(start, args.backends), strict=True))
        results = {name: answers(server, bodies, None) for name, server in servers.items()}
        first = args.backends[0]
        results[f"{first} alone"] = answers(servers[first], bodies, 1)
    pairs = {f"{a} / {b}": compare(results[a], results[b]) for a, b in itertools.combinations(results, 2)}
    (Path(args.out) / "compare_serve.json").write_text(json.dumps(pairs, indent=1))
    print("| pair | equal texts | tokens compared | logprob drift, max | mean |\n|---|---|---|---|---|")
    for name, pair in pairs.items():
        print(f"| {name} | {pair['equal']} of {pair['of']} | {pair['tokens']} | {pair['drift_max']:.2e} | "
              f"{pair['drift_mean']:.2e} |")  # fmt: skip


if __name__ == "__main__":
    main()
