"""Records which tests passed and failed, for scripts/support.py: FLASHCORE_TEST_RECORD names the file."""

from __future__ import annotations

import json
import os
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

_PASSED: Counter[str] = Counter()
_FAILED: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    function = report.nodeid.split("[")[0]
    if report.failed:
        _FAILED[function] += 1
    elif report.when == "call" and report.passed:
        _PASSED[function] += 1


def pytest_sessionfinish() -> None:
    path = os.environ.get("FLASHCORE_TEST_RECORD")
    if not path:
        return
    import torch

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    try:
        sglang = version("sglang")
    except PackageNotFoundError:
        sglang = ""
    record = {"device": "hopper" if hopper else "cpu", "sglang": sglang, "passed": _PASSED, "failed": _FAILED}
    Path(path).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
