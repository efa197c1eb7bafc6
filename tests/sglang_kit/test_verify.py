"""SGLang's verification cases on our backend, eager and under CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools
import unittest

import pytest
import torch
from sglang_kit.kit import HOPPER, OPTIONS, kit, prepare

if not HOPPER:
    pytest.skip("no Hopper GPU, whose kernels the kit imports", allow_module_level=True)

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verify_kit

from flashcore_sglang import backend
from flashcore_sglang.facts import facts_of

pytestmark = [pytest.mark.contract, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _prepared(monkeypatch):
    prepare(monkeypatch)
    with torch.no_grad():
        yield


def case(page_size: int, prefix_lens=(3, 200, 64), drafts: int = 3) -> kit.DenseAttentionCase:
    lens = tuple(prefix_lens), (drafts,) * len(prefix_lens)
    return kit.DenseAttentionCase("verify", "flashcore_sparse", ForwardMode.TARGET_VERIFY, 8, 2, page_size, *lens)


def with_branches(monkeypatch, topk: int) -> None:
    """The kit's server has no branches in its arguments."""
    monkeypatch.setattr(backend, "facts_of", lambda runner: dataclasses.replace(facts_of(runner), draft_branches=topk))


@pytest.mark.parametrize("kind", ["eagle", "ngram"])
@pytest.mark.parametrize("topk", [1, 2], ids=["chain", "tree"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_kit_verifies(page_size, topk, kind):
    verify_kit.run_dense_spec_verify_case(unittest.TestCase(), case(page_size), topk=topk, spec_kind=kind, **OPTIONS)


def test_kit_verifies_with_a_window():
    windowed = dataclasses.replace(case(1), sliding_window_size=100)
    verify_kit.run_dense_spec_verify_case(unittest.TestCase(), windowed, topk=1, **OPTIONS)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("topk", [1, 2], ids=["chain", "tree"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_kit_replays_a_verification(page_size, topk, window, monkeypatch):
    with_branches(monkeypatch, topk)
    # The kit writes the prefix a second time, at the slots of its contiguous layout.
    contiguous = functools.partial(kit.build_dense_attention_fixture, loc_layout="contiguous")
    monkeypatch.setattr(verify_kit, "build_dense_attention_fixture", contiguous)
    windowed = dataclasses.replace(case(page_size), sliding_window_size=window)
    verify_kit.run_dense_spec_verify_cuda_graph_case(
        unittest.TestCase(), windowed, topk=topk, cuda_graph_capture_batch_size=4, **OPTIONS
    )
