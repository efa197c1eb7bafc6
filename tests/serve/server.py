"""A real server in a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[2]
SERVE = ["bash", str(ROOT / "scripts" / "serve.sh")]
READY_SECONDS = 240


@dataclass
class Server:
    url: str
    log: Path
    process: subprocess.Popen

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self.process.poll() is None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(command: list[str], log: Path, arguments: list[str], **env: str) -> Server:
    port = free_port()
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, *arguments, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
            start_new_session=True,  # its own process group, so that a stop reaches all of its children
        )
    return Server(f"http://127.0.0.1:{port}", log, process)


def stop(server: Server) -> None:
    """At once: SGLang takes six seconds to end by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(20)


@contextlib.contextmanager
def running(command: list[str], log: Path, arguments: list[str], **env: str) -> Iterator[Server]:
    """The server, once it answers; stopped at the end."""
    server = launch(command, log, arguments, **env)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{server.url}/health", timeout=5).ok:
                    break
            assert server.is_alive(), f"the server ended:\n{server.text()[-4000:]}"
            assert time.monotonic() < deadline, f"not ready in {READY_SECONDS} s:\n{server.text()[-4000:]}"
            time.sleep(0.5)
        yield server
    finally:
        stop(server)
