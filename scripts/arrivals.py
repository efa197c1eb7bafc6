"""Requests that arrive at random, and how long servers let them wait: for the first token and between tokens."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from serve_report import Row
from serving import Answer, Server, encode, generate, must_succeed, session

CLIENTS = 4
"""Processes that send: one reads about 15,000 tokens per second, which a server exceeds in bursts."""

NEW_TOKENS = 4
"""At the end of a prompt, known to no cache: SGLang leaves extends of one token out of its graphs of prefill."""

LEAST_REQUESTS = 24
"""Of a round, however long it takes."""


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: p50 and p99."""
    ordered = sorted(seconds)
    at = {p: ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (50, 99)}
    return {f"p{p}_ms": 1e3 * value for p, value in at.items()}


def figures(answers: list[Answer]) -> dict[str, Any]:
    """Time to first token ("ttft") and between tokens ("itl") over all answers."""
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {"ttft": percentiles([answer.ttft for answer in answers]), "itl": percentiles(gaps)}


def arriving(row: Row, count: int, seed: int) -> list[list[int]]:
    """``count`` prompts: the row's in turn. Unless the row is cold, their last tokens are new."""
    generator = random.Random(f"{row.name} {seed}")
    prompts = row.prompts()
    out = []
    for i in range(count):
        prompt = prompts[i % len(prompts)]
        new = 0 if row.cold else min(NEW_TOKENS, len(prompt))
        out.append(prompt[: len(prompt) - new] + [generator.randrange(10, 10_000) for _ in range(new)])
    return out


def schedule(count: int, per_second: float, seed: int) -> list[float]:
    """Seconds from the first of ``count`` arrivals to each (Poisson)."""
    generator = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + generator.expovariate(per_second))
    return times


class Clients:
    """Processes that send requests and read their answers, without Python's garbage collection as they do."""

    def __enter__(self) -> Clients:
        self._pool = ProcessPoolExecutor(CLIENTS, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def send(self, url: str, bodies: list[bytes], times: list[float]) -> list[Answer]:
        """Each body at its time, in seconds from the beginning; answers in the order of the bodies.

        Raises RuntimeError if a request fails.
        """
        begin = time.monotonic() + 1.0  # by then all processes have theirs; the clock is one for all
        timed = list(zip(times, bodies, strict=True))
        parts = [self._pool.submit(_send, url, begin, timed[i::CLIENTS]) for i in range(CLIENTS)]
        answers = [Answer()] * len(bodies)
        for i, part in enumerate(parts):
            answers[i::CLIENTS] = part.result()
        return must_succeed(answers)


def _send(url: str, begin: float, timed: list[tuple[float, bytes]]) -> list[Answer]:
    gc.collect()
    gc.disable()
    return asyncio.run(_send_at(url, begin, timed))


async def _send_at(url: str, begin: float, timed: list[tuple[float, bytes]]) -> list[Answer]:
    async with session() as client:

        async def one(at: float, body: bytes) -> Answer:
            await asyncio.sleep(begin + at - time.monotonic())
            return await generate(client, url, body)

        return await asyncio.gather(*(one(at, body) for at, body in timed))


def load(
    clients: Clients,
    servers: dict[str, Server],
    row: Row,
    *,
    warm: Callable[[Server, Row], None],
    tokens_per_second: float,
    seconds: float,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Requests of the row, over and over, arriving so that they ask for ``tokens_per_second``: in rounds that the
    servers take in turn, the same arrivals for each, after one that is not measured. ``warm`` fills a cache with the
    row's prompts. Figures of each server, over all rounds and by round."""
    per_second = tokens_per_second / row.output
    count = max(LEAST_REQUESTS, int(per_second * seconds))

    def arrive(server: Server, seed: int) -> list[Answer]:
        if row.cold:
            server.flush_cache()
        bodies = [encode(prompt, row.output, stream=True) for prompt in arriving(row, count, seed)]
        return clients.send(server.url, bodies, schedule(count, per_second, seed))

    for server in servers.values():
        if not row.cold:
            warm(server, row)  # the row's own run has left its answers in the cache, too
        arrive(server, rounds)  # not measured
        server.post("/freeze_gc")
    answers: dict[str, list[list[Answer]]] = {name: [] for name in servers}
    for n in range(rounds):
        for name, server in servers.items():
            answers[name].append(arrive(server, n))
    return {
        name: {
            "requests": rounds * count,
            "tokens_per_second": tokens_per_second,
            **figures([answer for one in mine for answer in one]),
            "rounds": [figures(one) for one in mine],
        }
        for name, mine in answers.items()
    }
