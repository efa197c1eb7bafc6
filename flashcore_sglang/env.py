"""The environment variables that flashcore_sglang reads; `build.py` lists those of the compiler."""

from __future__ import annotations

import os
from pathlib import Path


def sharing() -> bool:
    """FLASHCORE_SHARING: 0 makes every request read its own pages; on by default."""
    value = os.environ.get("FLASHCORE_SHARING", "1")
    if value not in ("0", "1"):
        raise ValueError(f"FLASHCORE_SHARING: want 0 or 1, got {value!r}")
    return value == "1"


def log_interval() -> int:
    """FLASHCORE_LOG_INTERVAL: decode steps between two lines of statistics in the log; 0 is none, 100 by default."""
    value = os.environ.get("FLASHCORE_LOG_INTERVAL", "100")
    if not value.isdecimal():
        raise ValueError(f"FLASHCORE_LOG_INTERVAL: want an integer >= 0, got {value!r}")
    return int(value)


def record() -> Path | None:
    """FLASHCORE_RECORD: file that keeps the sampled decode batch with the most KV tokens; none by default."""
    value = os.environ.get("FLASHCORE_RECORD", "")
    if value and not Path(value).absolute().parent.is_dir():
        raise ValueError(f"FLASHCORE_RECORD: want a file in a folder that exists, got {value!r}")
    return Path(value).absolute() if value else None
