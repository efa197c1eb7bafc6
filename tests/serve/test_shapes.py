"""Small models of the shapes that SGLang treats specially: our backend gives the logits of the definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import torch
from shapes import SHAPES

needs.sglang()

pytestmark = pytest.mark.serve

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MAIN = Path(__file__).resolve().parent / "shape_main.py"
LARGEST = 0.02
"""Of the largest logit; bfloat16 keeps 8 bits, and a window that is off by 3 tokens gives 0.2."""


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_prompts_and_of_decode_steps(shape, page_size):
    if page_size > 1 and not HOPPER and shape != "gpt-oss":
        pytest.skip("one shape with larger pages is enough for PyTorch")
    beside = ["definition", "fa3"] if HOPPER else ["definition"]
    command = [sys.executable, str(MAIN), shape, "--page-size", str(page_size), "--beside", *beside]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"shape"')]
    assert [x["beside"] for x in lines] == beside
    assert all(x["graph"] == HOPPER for x in lines)
    assert max(error for x in lines for error in x["errors"]) < LARGEST
    assert lines[0]["pool"] == ("SWAKVPool" if shape == "gpt-oss" else "MHATokenToKVPool")
