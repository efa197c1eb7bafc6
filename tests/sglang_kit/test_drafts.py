"""SGLang's cases of draft models on our backend: its worker's rounds of steps, and its runners' graphs."""

from __future__ import annotations

import contextlib
import unittest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_runner as draft_kit
from sglang_kit.kit import HOPPER, OPTIONS, kit, prepare

from flashcore_sglang import reference
from flashcore_sglang.step import Drafts

pytestmark = [pytest.mark.contract, *([pytest.mark.gpu] if HOPPER else [])]
on_gpu = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
STEPS = 4


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


def run_steps(topk: int, page_size: int) -> None:
    draft_kit.run_dense_eagle_draft_cuda_graph_runner_case(
        unittest.TestCase(),
        case("DECODE", page_size),
        topk=topk,
        speculative_num_steps=STEPS,
        speculative_num_draft_tokens=STEPS + 1,
        **OPTIONS,
    )


SHAPES = pytest.mark.parametrize(
    ("topk", "page_size"), [(1, 1), (1, 16), (4, 1)], ids=["chain", "chain on pages", "tree"]
)


class DefinitionStep(AttentionBackend):
    """A step of a draft model by ``reference.extend``, on the live tables."""

    def __init__(self, runner: Any, topk: int, index: int) -> None:
        self.runner, self.topk, self.index = runner, topk, index
        self.token_to_kv_pool, self.req_to_token_pool = runner.token_to_kv_pool, runner.req_to_token_pool

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        pool, loc, page_size = self.token_to_kv_pool, forward_batch.out_cache_loc, self.runner.page_size
        pool.get_key_buffer(0)[loc], pool.get_value_buffer(0)[loc] = (
            x.view(-1, layer.tp_k_head_num, layer.head_dim) for x in (k, v)
        )
        drafts = Drafts(forward_batch.req_pool_indices, forward_batch.seq_lens, self.topk, STEPS)
        table, rows = drafts.table(self.req_to_token_pool.req_to_token, page_size)
        lens, ones = drafts.lens()[self.index], torch.ones(len(rows), dtype=torch.int64)
        buffers = pool.get_key_buffer(0), pool.get_value_buffer(0)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        out = reference.extend(q, *buffers, table, rows, lens, ones, page_size=page_size, scale=layer.scaling)
        return out.to(q.dtype).flatten(1)


class _EagerRoundDone(Exception):
    pass


def logits_of_a_round(monkeypatch, topk: int, page_size: int, make_steps=None) -> list[torch.Tensor]:
    """What the draft model says in each step of a round that SGLang's worker drives, without graphs."""
    logits: list[torch.Tensor] = []

    def run(worker: Any, batch: Any, **_: Any) -> None:
        forward = worker.model_runner.forward

        def recorded(forward_batch: Any) -> Any:
            done = forward(forward_batch)
            logits.append(done.logits_output.next_token_logits.clone())
            return done

        worker.model_runner.forward = recorded
        if make_steps:
            worker.draft_attn_backend = make_steps(worker.model_runner)
        worker.draft_attn_backend.init_forward_metadata(batch)
        batch.mark_forward_metadata_ready()
        worker.draft_forward(batch)
        raise _EagerRoundDone

    @contextlib.contextmanager
    def seeded(seed: int, *, device: Any):
        torch.manual_seed(seed)
        yield

    monkeypatch.setattr(draft_kit, "_run_eagle_draft_eager", run)
    monkeypatch.setattr(draft_kit, "_seeded_rng", seeded)  # theirs asks for a GPU
    torch.manual_seed(0)
    try:
        run_steps(topk, page_size)
    except ModuleNotFoundError as error:  # 0.5.23
        pytest.skip(f"the kit asks for {error.name}")
    except _EagerRoundDone:
        return logits
    raise AssertionError("the kit has not run a round")


@pytest.mark.skipif(HOPPER, reason="tests/gpu/test_drafts.py has the definition")
@SHAPES
def test_round_of_sglangs_worker_equals_the_definition(topk, page_size, monkeypatch, caplog):
    got = logits_of_a_round(monkeypatch, topk, page_size)
    assert "flashcore_sparse serves the steps of the draft model" in caplog.text

    def by_definition(runner: Any) -> SimpleNamespace:
        steps = [DefinitionStep(runner, topk, i) for i in range(STEPS - 1)]
        return SimpleNamespace(attn_backends=steps, init_forward_metadata=lambda batch: None)

    want = logits_of_a_round(monkeypatch, topk, page_size, by_definition)
    assert len(got) == len(want) == STEPS - 1
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@on_gpu
@SHAPES
def test_kit_replays_the_steps_of_a_draft_model(topk, page_size, caplog):
    run_steps(topk, page_size)
    assert "flashcore_sparse serves the steps of the draft model" in caplog.text


@on_gpu
@pytest.mark.parametrize("page_size", [1, 16])
def test_kit_replays_what_a_draft_model_takes_in(page_size, caplog):
    from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_extend_runner as extend_kit

    extend_kit.run_dense_eagle_draft_extend_v2_cuda_graph_runner_case(
        unittest.TestCase(), case("DRAFT_EXTEND_V2", page_size, new=4), **OPTIONS
    )
    assert "flashcore_sparse serves the extends of the draft model" in caplog.text
