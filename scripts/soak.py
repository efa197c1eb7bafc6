"""Mixed traffic on a server for some minutes: shared and distinct prompts, long and short, aborts, a small KV pool.

    python scripts/soak.py --model-path ... --minutes 8                     # Hopper: decode beside FA3
    python scripts/soak.py --model-path ... --minutes 8 --deterministic     # every answer must be reproduced exactly
    python scripts/soak.py --model-path ... --backend flashcore_sparse --server-args "--device cpu --dtype float32"

Then a part of the answers is asked for again, one at a time. With ``--deterministic`` they must be equal; otherwise the
drift of the logprobs is told, up to where the texts part. Fails (exit code 1) on an error of any request, a table
reported as wrong, an answer that is not reproduced, a server that ends, and memory that grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_serve import BACKENDS
from serving import Answer, Server, drift, encode, generate, running, session, stop_servers_on_sigterm

GROUPS, VOCABULARY = 6, 10_000
MEMORY_GROWTH = 1.1
"""Of host memory, last quarter of the run over the second; and of GPU memory."""


@dataclass
class Request:
    input_ids: list[int]
    output_tokens: int
    abort_after: float | None  # seconds
    answer: Answer | None = None


@dataclass
class Run:
    """What happened."""

    finished: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    aborted: int = 0
    host_mib: list[float] = field(default_factory=list)
    gpu_mib: list[float] = field(default_factory=list)


class Traffic:
    """Requests at random; the same seed gives the same ones. ``longest``: prompt tokens."""

    def __init__(self, seed: int, longest: int) -> None:
        self._random, self._longest = random.Random(seed), longest
        lengths = [longest * share // 100 for share in (1, 8, 20, 35, 50, 70)]
        self._prefixes = [self._tokens(lengths[i % len(lengths)]) for i in range(GROUPS)]

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(10, VOCABULARY) for _ in range(max(1, count))]

    def next(self) -> Request:
        kind = self._random.random()
        if kind < 0.6:
            prompt = self._random.choice(self._prefixes) + self._tokens(self._random.randrange(1, self._longest // 10))
        elif kind < 0.95:
            prompt = self._tokens(self._random.randrange(1, self._longest // 4))
        else:
            prompt = self._tokens(self._random.randrange(self._longest // 2, self._longest))
        abort = self._random.uniform(0.0, 2.0) if self._random.random() < 0.15 else None
        return Request(prompt, self._random.choice((1, 8, 32, 64, 128)), abort)


async def _one(client: Any, server: Server, request: Request, run: Run) -> None:
    name = uuid.uuid4().hex
    body = encode(request.input_ids, request.output_tokens, rid=name, return_logprob=True)
    task = asyncio.create_task(generate(client, server.url, body))
    if request.abort_after is not None:
        done, _ = await asyncio.wait([task], timeout=request.abort_after)
        if not done:
            async with client.post(f"{server.url}/abort_request", json={"rid": name}) as response:
                await response.read()
            await task
            run.aborted += 1
            return
    request.answer = await task
    if request.answer.error:
        run.errors.append(request.answer.error)
    else:
        run.finished.append(request)


async def drive(server: Server, traffic: Traffic, seconds: float, at_once: int) -> Run:
    """Keeps ``at_once`` requests on the way for ``seconds``, and watches memory."""
    run, end = Run(), time.monotonic() + seconds

    async def worker(client: Any) -> None:
        while time.monotonic() < end and server.process.poll() is None:
            await _one(client, server, traffic.next(), run)

    async def watch() -> None:
        while time.monotonic() < end:
            run.host_mib.append(_host_mib(server.process.pid))
            run.gpu_mib.append(_gpu_mib())
            await asyncio.sleep(max(1.0, seconds / 120))

    async with session() as client:
        await asyncio.gather(watch(), *(worker(client) for _ in range(at_once)))
    return run


def _host_mib(group: int) -> float:
    """Resident memory of all processes of the server."""
    pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(folder.name)) == group:
                pages += int((folder / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _gpu_mib() -> float:
    """Memory used on the GPUs that the server sees; 0 without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    try:
        return sum(float(line) for line in subprocess.check_output(command, text=True, timeout=30).split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0


def growth(samples: list[float]) -> float:
    """Last quarter over the second; 1 for too few samples."""
    quarter = len(samples) // 4
    if quarter < 2 or not samples[quarter]:
        return 1.0
    return statistics.median(samples[-quarter:]) / statistics.median(samples[quarter : 2 * quarter])


async def replay(server: Server, requests: list[Request], seconds: float) -> list[tuple[Request, Answer]]:
    """The requests again, one at a time, for at most ``seconds``."""
    out: list[tuple[Request, Answer]] = []
    end = time.monotonic() + seconds
    async with session() as client:
        for request in requests:
            if time.monotonic() > end:
                break
            body = encode(request.input_ids, request.output_tokens, return_logprob=True)
            out.append((request, await generate(client, server.url, body)))
    return out


def judge(run: Run, again: list[tuple[Request, Answer]], log: str, alive: bool, exact: bool) -> dict[str, Any]:
    """The summary; ``failures`` is empty if the soak passed."""
    pairs = [(request.answer, answer) for request, answer in again if request.answer]
    equal = sum(mine.output_ids == other.output_ids for mine, other in pairs)
    drifts = [d for mine, other in pairs for d in drift(mine, other)]
    tokens = sum(len(r.answer.output_ids) for r in run.finished if r.answer)
    facts = {
        "requests": len(run.finished),
        "output_tokens": tokens,
        "aborted": run.aborted,
        "retractions": log.count("Retract requests"),
        "replayed": len(again),
        "replayed_equal": equal,
        "logprob_drift_max": max(drifts, default=0.0),
        "logprob_drift_mean": statistics.fmean(drifts) if drifts else 0.0,
        "host_growth": growth(run.host_mib),
        "gpu_growth": growth(run.gpu_mib),
    }
    checks = {
        f"{len(run.errors)} requests failed, the first with: {run.errors[:1]}": not run.errors,
        "no request finished": bool(run.finished),
        "the server ended": alive,
        "a table was reported as wrong": "read as padding" not in log,
        f"{len(again) - equal} answers were not reproduced": not exact or equal == len(again),
        "a replay failed": not any(answer.error for _, answer in again),
        "memory grew": max(facts["host_growth"], facts["gpu_growth"]) < MEMORY_GROWTH,
    }
    return {**facts, "failures": [words for words, good in checks.items() if not good]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--replay-minutes", type=float, default=1.0)
    parser.add_argument("--backend", default="ours", help=f"of {', '.join(BACKENDS)}, or a name of SGLang's")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--at-once", type=int, default=200, help="requests on the way at a time")
    parser.add_argument("--pool", type=int, default=60_000, help="tokens of the KV pool; a small one makes retractions")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="more arguments for the server, in one string")
    parser.add_argument("--log", help="where the server's log goes")
    args = parser.parse_args()
    stop_servers_on_sigterm()
    arguments = ["--model-path", args.model_path, "--max-total-tokens", str(args.pool), "--random-seed", "1"]
    arguments += [*BACKENDS.get(args.backend, ["--attention-backend", args.backend]), "--skip-tokenizer-init"]
    arguments += ["--schedule-conservativeness", "0.1"]  # lets in more than fits in the end: retractions
    arguments += ["--max-running-requests", str(args.at_once)]  # deterministic inference wants a bound
    arguments += ["--enable-deterministic-inference"] if args.deterministic else []
    arguments += args.server_args.split()
    log = Path(args.log or tempfile.mkstemp(suffix=".log")[1])
    with running(arguments, log) as server:
        print(f"ready in {server.ready_seconds:.0f} s", flush=True)
        run = asyncio.run(drive(server, Traffic(args.seed, args.longest), 60 * args.minutes, args.at_once))
        print(f"{len(run.finished)} finished, {run.aborted} aborted, {len(run.errors)} failed; replaying", flush=True)
        again = asyncio.run(replay(server, run.finished[:: max(1, len(run.finished) // 300)], 60 * args.replay_minutes))
        summary = judge(run, again, server.log_text(), server.process.poll() is None, args.deterministic)
    print(json.dumps(summary, indent=1))
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
