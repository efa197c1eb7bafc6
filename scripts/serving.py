"""An SGLang server in a child process, and a client that sends it token ids; for bench_serve.py and soak.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

READY_SECONDS = 600.0
_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_DECODE_LINE = re.compile(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([\d.]+)")


def stop_servers_on_sigterm() -> None:
    """SIGTERM ends this program like Ctrl-C, through the ``finally`` that stops a server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Server:
    """A server that answers. ``ready_seconds``: from its start until then."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    ready_seconds: float = 0.0

    def log_size(self) -> int:
        return self.log.stat().st_size

    def log_text(self, offset: int = 0) -> str:
        """The log from byte ``offset`` on."""
        with open(self.log, "rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    def post(self, path: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> bytes:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()

    def flush_cache(self) -> None:
        """Empties the radix cache. Raises RuntimeError if requests are still running after 30 s."""
        for _ in range(60):
            with contextlib.suppress(urllib.error.HTTPError):
                self.post("/flush_cache")
                return
            time.sleep(0.5)
        raise RuntimeError("flush_cache: want an idle server, got requests that run on")

    def decode_rates(self, offset: int, running: int) -> list[float]:
        """SGLang's own "gen throughput" (tokens per second) in the log from ``offset`` on, while ``running`` requests
        decoded. The first such line counts the prefill before it and is left out."""
        lines = _DECODE_LINE.findall(self.log_text(offset))
        return [float(rate) for requests, rate in lines if int(requests) == running][1:]


@contextlib.contextmanager
def running(arguments: list[str], log: Path, **env: str) -> Iterator[Server]:
    """``python -m sglang.launch_server`` with these arguments, from when it answers until the end of the block.

    Raises RuntimeError with the end of the log if it does not come up.
    """
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(port), *arguments]
    start = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
            start_new_session=True,  # its own process group, so that a stop reaches all of its children
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        while not _answers(server.url):
            tail = server.log_text(max(0, server.log_size() - 4000))
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with code {process.returncode}:\n{tail}")
            if time.monotonic() - start > READY_SECONDS:
                raise RuntimeError(f"the server is not ready after {READY_SECONDS:.0f} s:\n{tail}")
            time.sleep(0.25)
        server.ready_seconds = time.monotonic() - start
        yield server
    finally:
        # At once: told to end, SGLang first looks for crashes for 5 s.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@dataclass
class Answer:
    """One request's answer. Times in seconds; ``arrivals`` are those of its tokens, counted from the sending."""

    seconds: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Between one token and the next."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def must_succeed(answers: list[Answer]) -> list[Answer]:
    """The answers. Raises RuntimeError if a request failed."""
    if errors := [a.error for a in answers if a.error]:
        raise RuntimeError(f"{len(errors)} of {len(answers)} requests failed, the first with: {errors[0]}")
    return answers


def drift(mine: Answer, other: Answer) -> list[float]:
    """Differences of logprob, absolute, of the tokens up to where the two greedy answers part; the first token that
    differs is left out, as those after it answer another text."""
    equal = list(zip(mine.output_ids, other.output_ids, strict=False))
    common = next((i for i, (a, b) in enumerate(equal) if a != b), len(equal))
    return [abs(a - b) for a, b in zip(mine.logprobs[:common], other.logprobs[:common], strict=False)]


def encode(input_ids: list[int], output_tokens: int, *, stream: bool = False, **options: Any) -> bytes:
    """The body of a /generate request: greedy, to the last of ``output_tokens``. ``options`` join the body."""
    sampling = {"temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True}
    return json.dumps({"input_ids": input_ids, "sampling_params": sampling, "stream": stream, **options}).encode()


def session() -> aiohttp.ClientSession:
    """For any number of requests at a time, however long they take."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
    )


async def generate(client: aiohttp.ClientSession, url: str, body: bytes) -> Answer:
    """Sends one request and reads its answer, streamed or whole. What goes wrong is in ``error``."""
    out = Answer()
    start = time.perf_counter()
    seen = 0
    try:
        async with client.post(f"{url}/generate", data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                out.error = f"{response.status}: {(await response.text())[:300]}"
                return out
            data: dict[str, Any] = {}
            if "event-stream" in response.headers.get("Content-Type", ""):
                last = b"{}"
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter() - start
                    last = line[6:]  # each repeats the answer so far, so only the last is parsed
                    count = int(found[1]) if (found := _TOKENS.search(last)) else 0
                    out.arrivals += [now] * (count - seen)
                    seen = max(seen, count)
                data = json.loads(last)
            else:
                data = json.loads(await response.read())
        meta = data.get("meta_info", {})
        out.seconds = time.perf_counter() - start
        out.output_ids = data.get("output_ids", [])
        out.logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or []]
        out.cached_tokens = meta.get("cached_tokens", 0)
        reason = meta.get("finish_reason") or {}
        out.error = reason.get("message", "aborted") if reason.get("type") == "abort" else None
        if not data or "error" in data:
            out.error = str(data.get("error", "the stream ended without an answer"))[:300]
    except (aiohttp.ClientError, ConnectionError, json.JSONDecodeError) as error:
        out.error = f"{type(error).__name__}: {error}"
    return out


async def send_all(url: str, bodies: list[bytes], at_once: int | None = None) -> list[Answer]:
    """All requests, ``at_once`` at a time (None: all at the same time); answers in the order of the bodies."""
    gate = asyncio.Semaphore(at_once or len(bodies) or 1)
    async with session() as client:

        async def one(body: bytes) -> Answer:
            async with gate:
                return await generate(client, url, body)

        return await asyncio.gather(*(one(body) for body in bodies))
