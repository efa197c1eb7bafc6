"""Programs of this folder that run side by side, as most of their time is one process's start."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SECONDS = 400


class Programs:
    """Runs of one program with several arguments, started at once: two at a time, or one for each pair of cores."""

    def __init__(self, name: str, arguments: list[tuple[str, ...]]) -> None:
        path = str(Path(__file__).with_name(name))
        self._pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2))
        self._runs: dict[tuple[str, ...], Future[subprocess.CompletedProcess[str]]] = {
            x: self._pool.submit(
                subprocess.run, [sys.executable, path, *x], capture_output=True, text=True, timeout=SECONDS
            )
            for x in dict.fromkeys(arguments)
        }

    def __getitem__(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """The finished run. Fails the test that asks if it did not succeed."""
        done = self._runs[arguments].result()
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done
