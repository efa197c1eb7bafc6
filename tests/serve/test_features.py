"""Engines with a feature of a deployment: the tokens of another attention backend under the same feature."""

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
    pytest.mark.skipif(not torch.cuda.is_available(), reason="engines with features are compared with fa3 on a GPU"),
]
BACKENDS = ("flashcore_sparse", "fa3")


@pytest.fixture(scope="module")
def programs(request) -> Programs:
    """Two for each selected test: ours and SGLang's."""
    selected = [x.callspec.params["feature"] for x in request.session.items if x.fspath == request.node.fspath]
    return Programs("feature_main.py", [(x, backend) for x in selected for backend in BACKENDS])


def compared(programs: Programs, feature: str) -> tuple[list[dict], str]:
    """Rounds of our engine, and its log. Fails where its tokens are not those of the other backend."""
    done = [programs[feature, backend] for backend in BACKENDS]
    ours, theirs = (json.loads(re.search(r"^ANSWERS (.*)$", x.stdout, re.M)[1]) for x in done)
    for mine, other in zip(ours, theirs, strict=True):
        for tokens, wanted, best in zip(mine["tokens"], other["tokens"], other["best"], strict=True):
            assert same_but_for_ties(tokens, wanted, best), (tokens, wanted, best)
    log = done[0].stdout + done[0].stderr
    assert "flashcore_sparse serves on" in log
    return ours, log


@pytest.mark.parametrize("feature", ["lora"])
def test_adapter_changes_the_requests_that_ask_for_it(programs, feature):
    ((answers,), _) = compared(programs, feature)
    with_adapter, without = answers["cached"][::2], answers["cached"][1::2]
    assert min(without) >= 300, "the prompts without the adapter share their prefix"
    assert min(with_adapter) < 300, "with the adapter K and V are its own"


@pytest.mark.parametrize("feature", ["pd"])
def test_decode_server_of_pd_disaggregation(programs, feature):
    _, log = compared(programs, feature)
    assert "nothing is shared (a PD decode server keeps no radix cache" in log


@pytest.mark.parametrize("feature", ["hicache"])
def test_prefixes_come_back_from_the_host(programs, feature):
    rounds, _ = compared(programs, feature)
    assert [x["found"] >= 300 for x in rounds] == [False, False, False, True]  # the pool has room for two of the three
