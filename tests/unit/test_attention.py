"""Attention on the CSR layout against the definition, on pools where every slot that nobody owns is NaN."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.strategies import PAGE_SIZES, TYPICAL, Batch, forests, page_numbers

from flashcore_sglang import ops, reference
from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.layout import CsrLayout, build_layout, build_layout_from_slots

TINY = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are small; threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A step: tables, pools and queries."""

    batch: Batch
    q_lens: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    logit_cap: float = 0.0
    sinks: torch.Tensor | None = None

    @property
    def table(self) -> torch.Tensor:
        """Row 0 is SGLang's padding row."""
        slots = self.batch.slots(garbage=0)
        return torch.cat((torch.zeros_like(slots[:1]), slots))

    @property
    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """req_pool_indices, seq_lens, q_lens."""
        n = self.batch.num_rows
        return torch.arange(1, n + 1), torch.tensor(self.batch.ends), torch.tensor(self.q_lens)

    def layout(self, cost: CostModel = SHARE_ALWAYS) -> CsrLayout:
        indices, lens, _ = self.vectors
        return build_layout_from_slots(self.table, indices, lens, self.batch.page_size, cost_model=cost)

    def attend(self, cost: CostModel = SHARE_ALWAYS, out: torch.Tensor | None = None) -> torch.Tensor:
        _, lens, q_lens = self.vectors
        plan = ops.plan(self.layout(cost), lens, q_lens)
        return ops.attend(
            self.q, self.k, self.v, plan, scale=self.scale, logit_cap=self.logit_cap, sinks=self.sinks, out=out
        )

    def defined(self) -> torch.Tensor:
        indices, lens, q_lens = self.vectors
        return reference.extend(
            self.q,
            self.k,
            self.v,
            self.table,
            indices,
            lens,
            q_lens,
            page_size=self.batch.page_size,
            scale=self.scale,
            logit_cap=self.logit_cap,
            sinks=self.sinks,
        )

    def owned(self, row: int) -> torch.Tensor:
        return self.table[row + 1, : self.batch.ends[row]].long()

    def tokens(self, row: int) -> slice:
        first = sum(self.q_lens[:row])
        return slice(first, first + self.q_lens[row])

    def plain(self) -> torch.Tensor:
        """PyTorch in the dtype of the inputs, request by request."""
        ratio = self.q.shape[1] // self.k.shape[1]
        outs = []
        for row, (end, count) in enumerate(zip(self.batch.ends, self.q_lens, strict=True)):
            q = self.q[self.tokens(row)].transpose(0, 1)
            k, v = (x[self.owned(row)].repeat_interleave(ratio, 1).transpose(0, 1) for x in (self.k, self.v))
            visible = torch.arange(end)[None, :] <= torch.arange(end - count, end)[:, None]
            if self.logit_cap == 0 and self.sinks is None:
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
            else:
                s = q @ k.transpose(1, 2) * self.scale
                if self.logit_cap:
                    s = self.logit_cap * torch.tanh(s / self.logit_cap)
                s = s.masked_fill(~visible, -torch.inf)
                if self.sinks is not None:
                    s = torch.cat((s, self.sinks.to(s.dtype)[:, None, None].expand(-1, count, 1)), 2)
                out = torch.softmax(s, 2)[:, :, :end] @ v
            outs.append(out.nan_to_num(0.0).transpose(0, 1))
        return torch.cat(outs)


def make(
    batch: Batch,
    q_lens: list[int] | None = None,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 32,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: object,
) -> Case:
    """A case of random numbers; slots that no request reads are NaN."""
    g = torch.Generator().manual_seed(seed)
    q_lens = [1] * batch.num_rows if q_lens is None else q_lens
    slots = batch.num_pages * batch.page_size
    k = torch.randn(slots, groups, dim, generator=g).to(dtype)
    v = torch.randn(slots, groups, dim if v_dim is None else v_dim, generator=g).to(dtype)
    q = torch.randn(sum(q_lens), heads, dim, generator=g).to(dtype)
    case = Case(batch, q_lens, q, k, v, dim**-0.5, **options)
    owned = torch.zeros(slots, dtype=torch.bool)
    for row in range(batch.num_rows):
        owned[case.owned(row)] = True
    k[~owned] = torch.nan
    v[~owned] = torch.nan
    return case


def forest(page_size: int = 16, ends: tuple[int, ...] = (70, 64, 33, 90, 17, 1), shuffled: bool = True) -> Batch:
    """Two groups of three rows: rows 0, 2, 4 share a page and 0, 2 one more; rows 1, 3, 5 read the same pages."""
    blocks = -(-max(ends) // page_size)
    pages = page_numbers(len(ends), blocks, "shuffled" if shuffled else "interleaved", 7)
    pages[2][: -(-32 // page_size)] = pages[0][: -(-32 // page_size)]
    pages[4][: -(-16 // page_size)] = pages[0][: -(-16 // page_size)]
    pages[3] = pages[5] = pages[1]
    return Batch(page_size, len(ends) * blocks + 1, pages, [0] * len(ends), list(ends))


MIXED = [5, 1, 0, 40, 17, 1]  # chunks with a cached prefix, decodes, nothing, a whole prompt


def assert_accurate(case: Case, cost: CostModel = SHARE_ALWAYS) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype."""
    got = case.attend(cost)
    assert got.dtype == case.q.dtype and got.isfinite().all()
    want, plain = case.defined(), case.plain()
    assert got.shape == want.shape == plain.shape
    if want.numel() == 0:
        return
    error, allowed = (got - want).abs().max().item(), (plain - want).abs().max().item()
    assert error <= 2 * allowed + TINY[case.q.dtype], f"error {error:.3g}, plain PyTorch {allowed:.3g}"


@pytest.mark.parametrize("q_lens", [None, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2), (8, 2), (14, 2), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attend_equals_reference_for_gqa_ratios(
    dtype: torch.dtype, heads: int, groups: int, q_lens: list[int] | None
) -> None:
    assert_accurate(make(forest(), q_lens, heads=heads, groups=groups, dtype=dtype))


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (80, 80), (17, 17), (1, 1), (96, 64), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_equals_reference_for_head_dims(dtype: torch.dtype, dim: int, v_dim: int) -> None:
    assert_accurate(make(forest(), MIXED, dim=dim, v_dim=v_dim, dtype=dtype))


@pytest.mark.parametrize("q_lens", [None, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_attend_equals_reference_for_page_sizes(page_size: int, q_lens: list[int] | None) -> None:
    assert_accurate(make(forest(page_size), q_lens))


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "interleaved"])
def test_attend_equals_reference_on_scattered_slots(shuffled: bool) -> None:
    assert_accurate(make(forest(1, shuffled=shuffled), MIXED))


@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_with_logit_cap_equals_reference(dtype: torch.dtype, cap: float) -> None:
    assert_accurate(make(forest(), MIXED, dtype=dtype, logit_cap=cap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_with_sinks_equals_reference(dtype: torch.dtype) -> None:
    sinks = torch.tensor([-5.0, 0.0, 1.5, 8.0])
    assert_accurate(make(forest(), MIXED, dtype=dtype, sinks=sinks))


def test_attend_with_sinks_and_logit_cap_caps_the_scores_alone() -> None:
    assert_accurate(make(forest(), MIXED, sinks=torch.full((4,), 3.0), logit_cap=1.0))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_attend_of_large_logits_equals_reference(spread: float) -> None:
    case = make(forest(), MIXED)
    assert_accurate(replace(case, scale=case.scale * spread))


@settings(max_examples=80)
@given(
    forests(min_rows=1, max_rows=6, max_blocks=4, page_sizes=(1, 3, 16)),
    st.sampled_from((SHARE_ALWAYS, TYPICAL, CostModel(1, 4, 2))),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.data(),
)
def test_attend_on_any_forest_equals_reference(batch: Batch, cost: CostModel, dtype: torch.dtype, data) -> None:
    q_lens = [data.draw(st.integers(0, end) | st.integers(0, min(1, end))) for end in batch.ends]
    assert_accurate(make(batch, q_lens, dtype=dtype, dim=16), cost)


@pytest.mark.parametrize("page_size", [1, 16])
def test_attend_does_not_depend_on_what_is_shared(page_size: int) -> None:
    case = make(forest(page_size), MIXED)
    alone = CostModel(segment_cost=2**30)
    assert case.layout(alone).tokens_stored > case.layout().tokens_stored
    torch.testing.assert_close(case.attend(), case.attend(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_twice_is_bitwise_equal(dtype: torch.dtype) -> None:
    case = make(forest(), MIXED, dtype=dtype)
    assert torch.equal(case.attend(), case.attend())


@pytest.mark.parametrize("q_lens", [[1] * 6, MIXED], ids=["decode", "mixed"])
def test_attend_of_permuted_requests_permutes_the_outputs(q_lens: list[int]) -> None:
    case = make(forest(), q_lens)
    out = case.attend()
    order = list(range(6))
    random.Random(3).shuffle(order)
    moved = replace(
        case,
        batch=case.batch.permuted(order),
        q_lens=[q_lens[i] for i in order],
        q=torch.cat([case.q[case.tokens(i)] for i in order]),
    )
    want = torch.cat([out[case.tokens(i)] for i in order])
    torch.testing.assert_close(moved.attend(), want, rtol=1e-5, atol=1e-6)


def test_attend_of_one_request_never_sees_foreign_slots() -> None:
    """With NaN in every slot but its own, the result of a request stays the same to the bit."""
    for page_size in (1, 16):
        case = make(forest(page_size), MIXED)
        out = case.attend()
        for row in range(case.batch.num_rows):
            k, v = torch.full_like(case.k, torch.nan), torch.full_like(case.v, torch.nan)
            k[case.owned(row)], v[case.owned(row)] = case.k[case.owned(row)], case.v[case.owned(row)]
            poisoned = replace(case, k=k, v=v).attend()
            assert torch.equal(poisoned[case.tokens(row)], out[case.tokens(row)])


def test_attend_of_a_query_never_sees_later_positions() -> None:
    """A chunk's query gives the same as if its request ended there."""
    case = make(forest(), MIXED)
    out = case.attend()
    row, count = 3, MIXED[3]
    for skipped in (1, 7, count - 1):
        ends = list(case.batch.ends)
        ends[row] -= skipped
        q_lens = list(MIXED)
        q_lens[row] -= skipped
        kept = torch.ones(len(case.q), dtype=torch.bool)
        kept[case.tokens(row).stop - skipped : case.tokens(row).stop] = False
        shorter = replace(case, batch=replace(case.batch, ends=ends), q_lens=q_lens, q=case.q[kept])
        torch.testing.assert_close(shorter.attend(), out[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)], ids=["plain", "sinks"])
def test_attend_of_length_zero_gives_zeros(sinks: torch.Tensor | None) -> None:
    case = make(forest(ends=(20, 0, 5, 0, 17, 1)), sinks=sinks)
    out = case.attend()
    assert (out[[1, 3]] == 0).all() and (out[[0, 2, 4, 5]] != 0).all()
    assert_accurate(case)


def test_attend_of_nothing_but_empty_rows_gives_zeros() -> None:
    assert (make(forest(ends=(0,) * 6)).attend() == 0).all()


def test_attend_of_no_tokens_is_empty() -> None:
    assert make(forest(), [0] * 6).attend().shape == (0, 4, 32)


def test_attend_of_an_empty_batch_is_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    layout = build_layout_from_slots(torch.zeros(1, 8, dtype=torch.int32), none, none, 4)
    out = ops.attend(torch.empty(0, 4, 8), torch.ones(8, 2, 8), torch.ones(8, 2, 6), ops.plan(layout, none), scale=1.0)
    assert out.shape == (0, 4, 6)


def test_attend_writes_and_returns_out() -> None:
    case = make(forest(), MIXED, dtype=torch.bfloat16)
    out = torch.full_like(case.q, torch.nan)
    assert case.attend(out=out) is out
    assert torch.equal(out, case.attend())


def test_attend_leaves_its_inputs_alone() -> None:
    case = make(forest(), MIXED, sinks=torch.ones(4), logit_cap=2.0)
    before = [x.clone() for x in (case.q, case.k, case.v, case.sinks)]
    case.attend()
    for x, y in zip(before, (case.q, case.k, case.v, case.sinks), strict=True):
        assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))


def test_attend_of_strided_queries_and_caches_equals_contiguous() -> None:
    case = make(forest(), MIXED)
    strided = replace(
        case, **{x: torch.stack((getattr(case, x), getattr(case, x) * 0), 1)[:, 0] for x in ("q", "k", "v")}
    )
    assert not strided.q.is_contiguous()
    torch.testing.assert_close(strided.attend(), case.attend(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scores", [1, 500, 3000])
def test_attend_in_small_tiles_equals_one_tile(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(forest(1), MIXED)
    want = case.attend()
    monkeypatch.setattr(ops, "_MAX_SCORES", scores)
    torch.testing.assert_close(case.attend(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q_lens", [None, MIXED])
@pytest.mark.parametrize(
    "k_scale, v_scale",
    [(None, None), (0.5, 2.0), (torch.tensor(0.3), torch.tensor([1.7])), (torch.tensor([0.3, 0.6]), torch.ones(2) / 3)],
)
def test_attend_on_an_e4m3_cache_equals_reference_on_its_values(q_lens, k_scale, v_scale) -> None:
    case = make(forest(), q_lens)
    case = replace(case, k=case.k.to(torch.float8_e4m3fn), v=case.v.to(torch.float8_e4m3fn), logit_cap=5.0)
    indices, lens, counts = case.vectors
    plan, options = ops.plan(case.layout(), lens, counts), {"scale": case.scale, "logit_cap": 5.0}
    got = ops.attend(case.q, case.k, case.v, plan, k_scale=k_scale, v_scale=v_scale, **options)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    want = reference.extend(
        case.q, case.k, case.v, case.table, indices, lens, counts, page_size=case.batch.page_size, **scales, **options
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_plan_serves_several_layers() -> None:
    """The plan holds no trace of the tensors it was used with."""
    a, b = make(forest(), MIXED, seed=1), make(forest(), MIXED, seed=2, heads=6, groups=3, dim=16)
    _, lens, q_lens = a.vectors
    plan = ops.plan(a.layout(), lens, q_lens)
    for case in (a, b, a):
        assert torch.equal(ops.attend(case.q, case.k, case.v, plan, scale=case.scale), case.attend())


def test_plan_reads_every_stored_token_once() -> None:
    case = make(forest())
    layout = case.layout()
    plan = ops.plan(layout, case.vectors[1])
    short = sum(int(read.lengths.sum()) for read in plan.short)
    assert sum(read.length for read in plan.reads) + short == layout.tokens_stored < layout.tokens_wanted
    assert len(plan.reads) + sum(len(read.lengths) for read in plan.short) == layout.num_segments


def test_plan_puts_short_segments_of_one_query_together() -> None:
    plan = ops.plan(make(forest()).layout(), make(forest()).vectors[1])
    assert plan.short
    for read in plan.short:
        assert len(set(read.tokens.tolist())) == len(read.tokens) > 1
        assert int(read.lengths.max()) == read.slots.shape[1] < 2 * int(read.lengths.min())


def test_plan_of_decode_masks_nothing() -> None:
    case = make(forest())
    assert all(read.positions is None for read in ops.plan(case.layout(), case.vectors[1]).reads)


def test_plan_without_q_lens_is_decode() -> None:
    case = make(forest())
    plan = ops.plan(case.layout(), case.vectors[1])
    assert torch.equal(ops.attend(case.q, case.k, case.v, plan, scale=case.scale), case.attend())


def test_plan_of_incomplete_layout_is_refused() -> None:
    table = torch.tensor([[4, 5, 6]], dtype=torch.int32)
    resident = torch.ones(10, dtype=torch.bool)
    resident[[5, 6]] = False
    layout = build_layout(table, torch.tensor([0]), torch.tensor([3]), resident, page_tokens=1, num_pages=10)
    with pytest.raises(ValueError, match=r"^layout: want every page resident, got 2 staged pages, first 5"):
        ops.plan(layout, torch.tensor([3]))


@pytest.mark.parametrize("name", ["seq_lens", "q_lens"])
def test_plan_of_vectors_that_do_not_fit_is_refused(name: str) -> None:
    case = make(forest())
    vectors = {"seq_lens": case.vectors[1], "q_lens": case.vectors[2], name: torch.ones(5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"^{name}: want 6 entries, one per row, got 5"):
        ops.plan(case.layout(), **vectors)


def test_attend_of_heads_that_are_no_multiple_is_refused() -> None:
    case = make(forest(), heads=4, groups=2)
    with pytest.raises(ValueError, match=r"^q: want a multiple of 2 heads, the heads of k_cache, got 3"):
        replace(case, q=case.q[:, :3]).attend()


def test_attend_of_tokens_that_are_not_the_plans_is_refused() -> None:
    case = make(forest())
    with pytest.raises(ValueError, match=r"^q: want 6 tokens, those of the plan, got 5"):
        replace(case, q=case.q[:5]).attend()
