"""An engine on two GPUs beside one on a single GPU, and beside FA3 on two: the same tokens."""

from __future__ import annotations

import json
import re

import needs
import pytest
import torch
from serve.programs import Programs
from serve.ties import same_but_for_ties

needs.sglang()

pytestmark = [
    pytest.mark.serve,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs"),
]

OURS, OURS_ALONE, FA3 = ("flashcore_sparse", "2"), ("flashcore_sparse", "1"), ("fa3", "2")


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs("tensor_parallel_main.py", [OURS, OURS_ALONE, FA3])


def answers_of(programs: Programs, arguments: tuple[str, str]) -> list:
    return json.loads(re.search(r"^ANSWERS (.*)$", programs[arguments].stdout, re.M)[1])


def test_both_ranks_serve_with_ours(programs):
    done = programs[OURS]
    assert len(re.findall(r"flashcore_sparse serves on cuda", done.stdout + done.stderr)) == 2


@pytest.mark.parametrize("other", [OURS_ALONE, FA3])
def test_two_gpus_answer_alike(programs, other):
    for (mine, _), (theirs, best) in zip(answers_of(programs, OURS), answers_of(programs, other), strict=True):
        assert same_but_for_ties(mine, theirs, best), (mine, theirs, best)
