"""Windows with a pool of their own under SGLang's scheduler: what it evicts and gives away is read by nobody."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import torch

needs.sglang()

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares tokens of float32, which is for CPUs"),
]


def test_a_request_in_a_crowd_answers_as_alone():
    command = [sys.executable, str(Path(__file__).with_name("window_main.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    answers = json.loads(re.search(r"^ANSWERS (.*)$", done.stdout, re.M)[1])
    assert answers["together"][:2] == answers["alone"]
    assert len({tuple(x) for x in answers["together"]}) == 6
    usage = re.findall(r"#full token: (\d+).*#swa token: (\d+)", done.stdout + done.stderr)
    assert any(int(full) > int(window) > 0 for full, window in usage), "nothing was evicted below a window"
    assert re.search(r"\((?:[2-9]|\d\d)\.\d+x shared\)", done.stdout + done.stderr), "nothing was shared"
