"""What a test module needs of the machine, or the reason it is skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def sglang() -> None:
    """Skips the module where SGLang is not installed; one that is installed and broken fails."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed", allow_module_level=True)
