"""Small models of the shapes that SGLang treats specially: our backend gives the logits of the definition."""

from __future__ import annotations

import json

import needs
import pytest
import torch
from serve.programs import Programs
from shapes import SHAPES

needs.sglang()

pytestmark = pytest.mark.serve

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LARGEST = 0.02
"""Of the largest logit; bfloat16 keeps 8 bits, and a window that is off by 3 tokens gives 0.2."""
CASES = [(x, size) for x in SHAPES for size in (1, 16) if HOPPER or x == "gpt-oss" or size == 1]
"""In PyTorch one shape with larger pages is enough."""
CHUNKS = [x for x in CASES if x[0].startswith("llama4")]
POOLS = {"gpt-oss": "SWAKVPool", "llama4": "SWAKVPool"}


def beside(shape: str, page_size: int) -> list[str]:
    """What logits are compared with. SGLang's fa3 ignores the chunks of a Llama 4 without its vision part, and up to
    0.5.16 takes their slots for pages."""
    wrong = shape == "llama4-text" or (shape == "llama4" and page_size > 1)
    return ["definition", "fa3"] if HOPPER and not wrong else ["definition"]


def arguments(shape: str, page_size: int) -> tuple[str, ...]:
    return shape, "--page-size", str(page_size), "--beside", *beside(shape, page_size)


@pytest.fixture(scope="module")
def programs(request) -> Programs:
    """One for each selected test."""
    params = [x.callspec.params for x in request.session.items if x.fspath == request.node.fspath]
    return Programs("shape_main.py", [arguments(p["shape"], p["page_size"]) for p in params])


def check(programs: Programs, shape: str, page_size: int) -> None:
    output = programs[arguments(shape, page_size)].stdout
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"shape"')]
    assert [x["beside"] for x in lines] == beside(shape, page_size)
    assert all(x["graph"] == HOPPER and x["plan"] == ("GpuStep" if HOPPER else "CpuStep") for x in lines)
    assert max(error for x in lines for error in x["errors"]) < LARGEST
    assert lines[0]["pool"] == POOLS.get(shape, "MHATokenToKVPool")


@pytest.mark.parametrize(("shape", "page_size"), [x for x in CASES if x not in CHUNKS])
def test_logits_of_prompts_and_of_decode_steps(programs, shape, page_size):
    check(programs, shape, page_size)


@pytest.mark.parametrize(("shape", "page_size"), CHUNKS)
def test_logits_with_attention_in_chunks(programs, shape, page_size):
    check(programs, shape, page_size)
