"""The pager against the oracle, over batches that hypothesis makes up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit import oracle
from unit.strategies import PAGE_SIZES, Batch, batches, cost_models, forests, nonsense

from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.layout import CsrLayout, CsrPager, build_layout, build_layout_from_slots


def build(batch: Batch, cost: CostModel = SHARE_ALWAYS, **kwargs: object) -> CsrLayout:
    table = kwargs.pop("table", None)
    table = batch.token_to_page() if table is None else table
    return build_layout(
        table,
        *batch.vectors(),
        page_tokens=batch.page_size,
        num_pages=batch.num_pages,
        cost_model=cost,
        **kwargs,
    )


@settings(max_examples=300)
@given(batches(), cost_models())
def test_layout_equals_oracle(batch: Batch, cost: CostModel) -> None:
    oracle.assert_equal(build(batch, cost), oracle.expected_layout(batch.requests(), batch.page_size, cost))


@settings(max_examples=300)
@given(batches(), cost_models())
def test_layout_covers_every_position_once_without_false_share(batch: Batch, cost: CostModel) -> None:
    oracle.check_invariants(build(batch, cost), batch.requests(), batch.page_size)


@given(forests(min_rows=6, max_rows=24, max_blocks=12, page_sizes=(1, 3)), cost_models())
def test_layout_of_wide_forest_equals_oracle(batch: Batch, cost: CostModel) -> None:
    layout = build(batch, cost)
    oracle.assert_equal(layout, oracle.expected_layout(batch.requests(), batch.page_size, cost))
    oracle.check_invariants(layout, batch.requests(), batch.page_size)


@settings(max_examples=300)
@given(nonsense(), cost_models())
def test_layout_of_broken_radix_never_shares_falsely(batch: Batch, cost: CostModel) -> None:
    layout = build(batch, cost)
    oracle.check_invariants(layout, batch.requests(), batch.page_size)
    oracle.assert_equal(layout, oracle.expected_layout(batch.requests(), batch.page_size, cost))


@given(batches(), cost_models())
def test_layout_twice_is_bitwise_equal(batch: Batch, cost: CostModel) -> None:
    oracle.assert_same(build(batch, cost), build(batch, cost))


@given(forests(min_rows=1) | nonsense(with_starts=False), cost_models(), st.randoms(use_true_random=False))
def test_layout_of_permuted_requests_has_the_same_segments(batch: Batch, cost: CostModel, random) -> None:
    order = list(range(batch.num_rows))
    random.shuffle(order)

    def segments(layout: CsrLayout, label: list[int]) -> list:
        rows = layout.row_order.tolist()
        pages, positions = layout.page_indices.tolist(), layout.segment_positions.tolist()
        indptr = layout.page_indptr.tolist()
        # Rows that read the same are interchangeable: name each by what it reads.
        content = [(batch.pages[r][: -(-batch.ends[r] // batch.page_size)], batch.ends[r]) for r in label]
        return sorted(
            (sorted(content[r] for r in rows[a:b]), positions[i], pages[indptr[i] : indptr[i + 1]])
            for i, (a, b) in enumerate(layout.segment_rows.tolist())
        )

    shuffled = build(batch.permuted(order), cost)
    assert segments(build(batch, cost), list(range(batch.num_rows))) == segments(shuffled, order)


@given(batches(), st.sampled_from((-1, 2**31 - 1, 0)))
def test_layout_ignores_ids_outside_the_ranges(batch: Batch, garbage: int) -> None:
    oracle.assert_same(build(batch), build(batch, table=batch.token_to_page(garbage)))


@given(forests(), st.sampled_from((-1, 2**31 - 1, 0)))
def test_layout_from_slots_ignores_slots_past_the_end(batch: Batch, garbage: int) -> None:
    rows = torch.arange(1, batch.num_rows + 1)
    table = torch.full((batch.num_rows + 1, batch.num_blocks * batch.page_size), garbage, dtype=torch.int32)
    table[1:] = batch.slots(garbage)
    layout = build_layout_from_slots(
        table, rows, batch.vectors()[1], batch.page_size, num_pages=batch.num_pages, cost_model=SHARE_ALWAYS
    )
    oracle.assert_same(layout, build(batch))


@given(batches(), cost_models(), st.data())
@pytest.mark.parametrize("form", ["bool", "uint8", "packed"])
def test_layout_stages_missing_pages_once(form: str, batch: Batch, cost: CostModel, data) -> None:
    missing = frozenset(data.draw(st.sets(st.integers(0, batch.num_pages - 1))))
    resident = torch.tensor([p not in missing for p in range(batch.num_pages)])
    if form == "uint8":
        resident = resident.to(torch.uint8) * 255  # any bit set counts
    if form == "packed":
        words = [
            sum(1 << (p % 32) for p in range(w, min(w + 32, batch.num_pages)) if p not in missing)
            for w in range(0, batch.num_pages, 32)
        ]
        resident = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    layout = build(batch, cost, page_resident_bitmap=resident)
    oracle.check_invariants(layout, batch.requests(), batch.page_size, missing)
    oracle.assert_equal(layout, oracle.expected_layout(batch.requests(), batch.page_size, cost, missing))


@given(batches())
def test_layout_of_one_id_per_page_equals_one_per_position(batch: Batch) -> None:
    table = batch.page_ids().unsqueeze(-1).expand(-1, -1, batch.page_size)
    oracle.assert_same(build(batch, table=table), build(batch))


@given(batches())
@pytest.mark.parametrize("view", ["transposed", "columns", "rows", "pages"])
def test_layout_of_strided_table_equals_contiguous(view: str, batch: Batch) -> None:
    table = batch.token_to_page()
    if view == "transposed":
        table = table.t().contiguous().t()
    elif view == "columns":
        table = torch.stack((table, torch.full_like(table, -1)), 2)[:, :, 0]
    elif view == "rows":
        table = torch.stack((table, torch.full_like(table, -1)), 1)[:, 0]
    else:
        pages = batch.page_ids()
        table = torch.stack((pages, torch.full_like(pages, -1)), 2)[:, :, :1].expand(-1, -1, batch.page_size)
    oracle.assert_same(build(batch, table=table), build(batch))


@given(batches(), st.sampled_from((torch.int32, torch.int64)), st.sampled_from((torch.int32, torch.int64)))
def test_layout_of_int32_and_int64_vectors_is_the_same(batch: Batch, first: torch.dtype, second: torch.dtype) -> None:
    starts, ends = torch.tensor(batch.starts, dtype=first), torch.tensor(batch.ends, dtype=second)
    layout = build_layout(
        batch.token_to_page(),
        torch.stack((starts, starts), 1)[:, 0],  # strided
        ends,
        page_tokens=batch.page_size,
        num_pages=batch.num_pages,
        cost_model=SHARE_ALWAYS,
    )
    oracle.assert_same(layout, build(batch))


@given(forests(min_rows=1), cost_models(), st.data())
def test_pager_never_groups_padding_rows(batch: Batch, cost: CostModel, data) -> None:
    """Padding requests point at row 0 of the table, which may look like anybody's prefix."""
    table = torch.cat((batch.slots()[:1], batch.slots()))
    rows = data.draw(st.lists(st.integers(0, batch.num_rows), min_size=1, max_size=8))
    lens = [data.draw(st.integers(0, 2)) if r == 0 else batch.ends[r - 1] for r in rows]
    lens = [min(n, table.shape[1]) for n in lens]
    layout = CsrPager(batch.page_size, num_pages=batch.num_pages, cost_model=cost).step(
        table, torch.tensor(rows), torch.tensor(lens)
    )
    requests, status = oracle.read_requests(
        lambda r, p: table[rows[r], p].item(),
        [(0, n) for n in lens],
        width=table.shape[1],
        page_size=batch.page_size,
        num_pages=batch.num_pages,
        divisor=batch.page_size,
        may_share=[r != 0 for r in rows],
    )
    oracle.check_invariants(layout, requests, batch.page_size)
    oracle.assert_equal(layout, oracle.expected_layout(requests, batch.page_size, cost))
    assert layout.status == status == (0, 0, 0, 0)


@given(forests(min_rows=1))
def test_pager_without_sharing_gives_every_row_its_own_segment(batch: Batch) -> None:
    pager = CsrPager(batch.page_size, num_pages=batch.num_pages, cost_model=SHARE_ALWAYS, sharing=False)
    layout = pager.step(batch.slots(), torch.arange(batch.num_rows), batch.vectors()[1])
    own = [[0, end] for end in batch.ends if end]
    assert layout.segment_positions.tolist() == own
    assert layout.row_order.tolist() == list(range(batch.num_rows))
    assert layout.tokens_stored == layout.tokens_wanted == sum(batch.ends)


@given(st.sampled_from(PAGE_SIZES), st.data())
def test_layout_of_ranges_inside_one_page_equals_oracle(page_size: int, data) -> None:
    """One physical page, many sub-ranges of it."""
    bounds = st.tuples(st.integers(0, page_size), st.integers(0, page_size)).map(sorted)
    ranges = data.draw(st.lists(bounds, min_size=1, max_size=6))
    rows = len(ranges)
    batch = Batch(page_size, 4, [[3]] * rows, [a for a, _ in ranges], [b for _, b in ranges])
    layout = build(batch)
    oracle.assert_equal(layout, oracle.expected_layout(batch.requests(), page_size, SHARE_ALWAYS))
    oracle.check_invariants(layout, batch.requests(), page_size)
