"""Several processes on one GPU: its time slices stretch every wait of a kernel at any point. On an idle GPU a missing
wait is rarely seen; so, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
PROCESSES, SECONDS = 6, 10


def test_results_do_not_depend_on_who_else_uses_the_gpu():
    tests = Path(__file__).parents[1]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    }
    command = [sys.executable, str(tests / "gpu" / "contention.py")]
    running = [
        subprocess.Popen([*command, str(seed), str(SECONDS)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for seed in range(PROCESSES)
    ]
    outputs = [process.communicate(timeout=120)[0].decode()[-2000:] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(outputs)
