"""Where the time of decode steps goes on a GPU, by SGLang's own profiler: attention, matrix products, and the rest."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from serving import Server

STEPS = 8
KINDS = {
    "attention": r"flashcore.*(decode|extend|gather|merge)_kernel|FlashAttn|flashinfer::.*(Decode|Prefill|MergeStates)",
    "plan": r"flashcore|prepare_varlen",
    "products": r"gemm|nvjet|cutlass|cublas|splitk",
}
"""Kernels by name; the first that fits counts, and what fits none is the rest."""


def split(events: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time from a trace's first kernel to the end of its last one, by kind; "idle": no kernel ran.
    Kernels that ran side by side all count. Raises ValueError for a trace without kernels."""
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    if not kernels:
        raise ValueError("trace: want kernels, got none")
    out = dict.fromkeys([*KINDS, "rest", "idle"], 0.0)
    begin = end = kernels[0]["ts"]
    for kernel in kernels:
        names = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel["name"], re.IGNORECASE))
        out[next(names, "rest")] += kernel["dur"]
        out["idle"] += max(0.0, kernel["ts"] - end)
        end = max(end, kernel["ts"] + kernel["dur"])
    return {kind: time / (end - begin) for kind, time in out.items()}


def profile(server: Server, timeout: float = 60.0) -> dict[str, float]:
    """``split`` of the next ``STEPS`` steps of a server that decodes. Raises TimeoutError if no trace comes."""
    with tempfile.TemporaryDirectory() as folder:
        body = {"output_dir": folder, "num_steps": STEPS, "activities": ["GPU"], "with_stack": False}
        server.post("/start_profile", body, timeout)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for path in Path(folder).glob("*.trace.json.gz"):
                try:
                    return split(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])
                except (EOFError, OSError, zlib.error, json.JSONDecodeError):  # still being written
                    continue
            time.sleep(0.2)
    raise TimeoutError(f"/start_profile: want a trace of {STEPS} steps, got none in {timeout:.0f} s")
