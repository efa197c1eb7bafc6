"""The definition itself, against PyTorch and against arithmetic by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from flashcore_sglang import reference
from flashcore_sglang.config import SHARE_ALWAYS
from flashcore_sglang.layout import build_layout


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (7, 1)])
def test_attention_equals_torch_sdpa(heads: int, groups: int) -> None:
    q, k, v = random(5, heads, 8), random(9, groups, 8, seed=1), random(9, groups, 6, seed=2)
    out, _ = reference.attention(q, k, v, scale=0.3)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), scale=0.3, enable_gqa=True
    )
    close(out, want[0].transpose(0, 1))


def test_attention_with_a_mask_equals_torch_sdpa() -> None:
    q, k, v = random(4, 2, 8), random(4, 2, 8, seed=1), random(4, 2, 8, seed=2)
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    out, _ = reference.attention(q, k, v, scale=1.0, visible=visible)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=1.0
    )
    close(out, want.transpose(0, 1))


def test_attention_lse_is_the_log_of_the_sum() -> None:
    q = torch.tensor([[[2.0]]])
    k, v = torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[[10.0]], [[20.0]]])
    out, lse = reference.attention(q, k, v, scale=0.5)
    assert lse.item() == pytest.approx(math.log(1 + math.e))
    assert out.item() == pytest.approx((10 + 20 * math.e) / (1 + math.e))


def test_attention_logit_cap_bends_the_scaled_score() -> None:
    q, k, v = torch.tensor([[[3.0]]]), torch.tensor([[[0.0]], [[4.0]]]), torch.tensor([[[0.0]], [[1.0]]])
    out, _ = reference.attention(q, k, v, scale=0.5, logit_cap=2.0)
    p = math.exp(2 * math.tanh(6 / 2))
    assert out.item() == pytest.approx(p / (1 + p))


def test_attention_sink_takes_weight_and_gives_no_value() -> None:
    q, k, v = torch.tensor([[[1.0]]]), torch.tensor([[[1.0]]]), torch.tensor([[[8.0]]])
    out, lse = reference.attention(q, k, v, scale=1.0, sinks=torch.tensor([1.0]))
    assert out.item() == pytest.approx(4.0)
    assert lse.item() == pytest.approx(1 + math.log(2))


def test_attention_of_nothing_visible_is_zero() -> None:
    q, k = random(2, 3, 4), random(5, 3, 4, seed=1)
    out, lse = reference.attention(q, k, k, scale=1.0, visible=torch.zeros(2, 5, dtype=torch.bool))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_attention_over_no_keys_is_zero() -> None:
    out, lse = reference.attention(random(2, 3, 4), random(0, 3, 4), random(0, 3, 5), scale=1.0)
    assert out.shape == (2, 3, 5) and (out == 0).all() and (lse == -torch.inf).all()


def test_attention_computes_in_float64() -> None:
    """Scores that float32 cannot tell apart."""
    q, k = torch.tensor([[[1.0]]]), torch.tensor([[[2.0**26]], [[2.0**26 - 4]]])
    out, _ = reference.attention(q, k, torch.tensor([[[1.0]], [[0.0]]]), scale=0.25)
    assert out.dtype == torch.float64
    assert out.item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_slots_of_follows_the_first_slot_of_each_page() -> None:
    table = torch.tensor([[0] * 6, [12, 13, 14, 4, -9, -9]], dtype=torch.int32)
    assert reference.slots_of(table, 1, 5, 3).tolist() == [12, 13, 14, 3, 4]


@pytest.mark.parametrize("cap", [0.0, 1.0])
def test_extend_equals_sdpa_per_request(cap: float) -> None:
    """Two requests: a chunk of 3 behind 4 cached tokens, and a decode."""
    k, v = random(20, 2, 8), random(20, 2, 8, seed=1)
    q = random(4, 2, 8, seed=2)
    table = torch.randperm(20, generator=torch.Generator().manual_seed(3)).to(torch.int32).view(2, 10)
    lens, q_lens = torch.tensor([7, 5]), torch.tensor([3, 1])
    out = reference.extend(q, k, v, table, torch.tensor([1, 0]), lens, q_lens, page_size=1, scale=0.4, logit_cap=cap)
    wants = []
    for i, position in ((1, 4), (1, 5), (1, 6), (0, 4)):
        slots = table[i, : position + 1].long()
        s = torch.einsum("hd,lhd->hl", q[len(wants)], k[slots]) * 0.4
        s = torch.tanh(s) if cap else s
        wants.append(torch.einsum("hl,lhd->hd", torch.softmax(s, 1), v[slots]))
    close(out, torch.stack(wants))


def test_extend_of_no_requests_is_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    cache = torch.ones(4, 1, 8)
    out = reference.extend(
        torch.empty(0, 2, 8), cache, cache[..., :6], none.view(0, 1), none, none, none, page_size=1, scale=1.0
    )
    assert out.shape == (0, 2, 6)


def test_extend_of_length_zero_is_zero() -> None:
    cache = torch.ones(4, 1, 8)
    out = reference.extend(
        torch.ones(1, 2, 8),
        cache,
        cache,
        torch.zeros(1, 4, dtype=torch.int32),
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([1]),
        page_size=1,
        scale=1.0,
    )
    assert out.shape == (1, 2, 8) and (out == 0).all()


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 9), (0, 5)])
def test_merge_of_parts_equals_the_whole(cuts: tuple[int, ...]) -> None:
    q, k, v = random(4, 6, 8), random(10, 2, 8, seed=1), random(10, 2, 5, seed=2)
    whole, lse = reference.attention(q, k, v, scale=0.7)
    bounds = (0, *cuts, 10)
    parts = [reference.attention(q, k[a:b], v[a:b], scale=0.7) for a, b in pairwise(bounds)]
    out, merged_lse = reference.merge(torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts]))
    close(out, whole)
    close(merged_lse, lse)


def test_merge_of_one_part_is_that_part() -> None:
    out, lse = reference.attention(random(2, 2, 4), random(3, 2, 4, seed=1), random(3, 2, 4, seed=2), scale=1.0)
    merged, merged_lse = reference.merge(out[None], lse[None])
    close(merged, out)
    close(merged_lse, lse)


def test_merge_of_empty_parts_is_zero() -> None:
    out, lse = reference.merge(torch.zeros(3, 1, 2, 4), torch.full((3, 1, 2), -torch.inf))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_segment_slots_equal_the_runs() -> None:
    table = torch.tensor([[5, 6, 2], [5, 6, 9]], dtype=torch.int32).repeat_interleave(4, 1)
    layout = build_layout(
        table, torch.tensor([1, 2]), torch.tensor([11, 12]), page_tokens=4, num_pages=16, cost_model=SHARE_ALWAYS
    )
    assert layout.num_segments > 2
    for i in range(layout.num_segments):
        runs = layout.runs[layout.run_indptr[i] : layout.run_indptr[i + 1]].tolist()
        want = [slot for first, count in runs for slot in range(first, first + count)]
        assert reference.segment_slots(layout, i).tolist() == want
