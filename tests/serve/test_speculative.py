"""Engines that draft and verify, beside one that does not: the same tokens, in fewer steps."""

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
    pytest.mark.skipif(not torch.cuda.is_available(), reason="SGLang makes trees of drafts on a GPU only"),
]


VARIANTS = ["chain", "tree", "tree on pages", "beside fa3", "ngram"]
STEPS = ["flashcore_sparse serves the steps of the draft model", "Capture draft decode CUDA graph end"]
EXTENDS = [
    "flashcore_sparse serves the extends of the draft model",
    "Capture draft extend CUDA graph end",
]
LOGGED = {"none": [], "none on pages": [], "ngram": [], "beside fa3": STEPS}
"""What the log says of draft models at least; of the other variants it says all."""


def plain_of(variant: str) -> str:
    """The engine that drafts nothing, to compare with."""
    return "none on pages" if "pages" in variant else "none"


@pytest.fixture(scope="module")
def programs(request) -> Programs:
    """One for each selected test, and those that draft nothing."""
    selected = [x.callspec.params["variant"] for x in request.session.items if x.fspath == request.node.fspath]
    return Programs("spec_main.py", [(variant,) for name in selected for variant in (name, plain_of(name))])


def answers_of(programs: Programs, variant: str) -> dict:
    done = programs[variant,]
    log = done.stdout + done.stderr
    assert "flashcore_sparse serves on cuda" in log
    wanted = LOGGED.get(variant, STEPS + EXTENDS)
    assert [line for line in wanted if line not in log] == []
    assert (EXTENDS[0] in log) == (EXTENDS[0] in wanted)
    return json.loads(re.search(r"^ANSWERS (.*)$", done.stdout, re.M)[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_change_the_steps_and_not_the_tokens(programs, variant):
    answers, plain = answers_of(programs, variant), answers_of(programs, plain_of(variant))
    for tokens, other, best in zip(answers["tokens"], plain["tokens"], plain["best"], strict=True):
        assert same_but_for_ties(tokens, other, best), (tokens, other, best)
    if variant != "ngram":  # the drafting model is the verifying one
        assert max(answers["steps"]) <= 12
