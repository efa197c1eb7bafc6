"""SGLang's cases of draft models on our backend: its runners' graphs of steps and of extends, beside eager rounds."""

from __future__ import annotations

import unittest

import pytest
import torch
from sglang_kit.kit import HOPPER, OPTIONS, kit, prepare

if not HOPPER:
    pytest.skip("no Hopper GPU, whose kernels the kit imports", allow_module_level=True)

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_extend_runner as extend_kit
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_runner as draft_kit

pytestmark = [pytest.mark.contract, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _prepared(monkeypatch, caplog):
    prepare(monkeypatch)
    HookRegistry.apply_hooks()
    with torch.no_grad():
        yield
    assert "fa3 serves" not in caplog.text


def case(mode: str, page_size: int, lens=(3, 200, 64), new: int = 1) -> kit.DenseAttentionCase:
    new_lens = () if mode == "DECODE" else (new,) * len(lens)
    return kit.DenseAttentionCase("drafts", "flashcore_sparse", ForwardMode[mode], 8, 2, page_size, lens, new_lens)


@pytest.mark.parametrize(("topk", "page_size"), [(1, 1), (1, 16), (4, 1)], ids=["chain", "chain on pages", "tree"])
def test_kit_replays_the_steps_of_a_draft_model(topk, page_size, caplog):
    draft_kit.run_dense_eagle_draft_cuda_graph_runner_case(
        unittest.TestCase(),
        case("DECODE", page_size),
        topk=topk,
        speculative_num_steps=4,
        speculative_num_draft_tokens=5,
        **OPTIONS,
    )
    assert "flashcore_sparse serves the steps of the draft model" in caplog.text


@pytest.mark.parametrize("page_size", [1, 16])
def test_kit_replays_what_a_draft_model_takes_in(page_size, caplog):
    extend_kit.run_dense_eagle_draft_extend_v2_cuda_graph_runner_case(
        unittest.TestCase(), case("DRAFT_EXTEND_V2", page_size, new=4), **OPTIONS
    )
    assert "flashcore_sparse serves the extends of the draft model" in caplog.text
