"""Tables that hold anything: the pager reports, stays inside the pool, and serves the other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit import oracle

from flashcore_sglang.config import SHARE_ALWAYS
from flashcore_sglang.layout import CsrLayout, CsrPager

WIDTH, NUM_PAGES = 24, 10


def step(table: torch.Tensor, rows: list[int], lens: list[int], page_size: int = 4, **kwargs: bool) -> CsrLayout:
    pager = CsrPager(page_size, num_pages=NUM_PAGES, cost_model=SHARE_ALWAYS)
    return pager.step(table, torch.tensor(rows, dtype=torch.int64), torch.tensor(lens, dtype=torch.int64), **kwargs)


def good_table(rows: int = 3, page_size: int = 4) -> torch.Tensor:
    """All rows read pages 1, 2, 3, ..."""
    return torch.arange(page_size, page_size + WIDTH, dtype=torch.int32).repeat(rows, 1)


@pytest.mark.parametrize("value", [-1, -(2**31), 40, 2**31 - 1])
def test_status_names_a_page_id_outside_the_pool(value: int) -> None:
    table = good_table()
    table[2, 8] = value
    layout = step(table, [1, 2], [12, 12])
    assert layout.status == (1, 1, 8, value)
    assert layout.page_indices[-1] == 0 or 0 in layout.page_indices.tolist()


def test_status_spares_the_other_rows() -> None:
    table = good_table()
    table[2, 4] = -1
    layout = step(table, [1, 2, 1], [12, 12, 10])
    for row, end in ((0, 12), (2, 10)):
        mine = layout.row_segments[layout.row_indptr[row] : layout.row_indptr[row + 1]].tolist()
        slots = torch.cat([_slots(layout, i) for i in mine])
        assert slots.tolist() == list(range(4, 4 + end))


def _slots(layout: CsrLayout, segment: int) -> torch.Tensor:
    runs = layout.runs[layout.run_indptr[segment] : layout.run_indptr[segment + 1]].tolist()
    return torch.cat([torch.arange(first, first + count) for first, count in runs])


@pytest.mark.parametrize("length", [WIDTH + 1, 2**31 - 1])
def test_status_names_a_length_beyond_the_table(length: int) -> None:
    layout = step(good_table(), [1, 2], [3, length])
    assert layout.status == (2, 1, 0, length)
    assert layout.tokens_wanted == 3 + WIDTH


@pytest.mark.parametrize("length", [-1, -(2**31)])
def test_status_names_a_negative_length(length: int) -> None:
    layout = step(good_table(), [1, 2], [3, length])
    assert layout.status == (3, 1, 0, length)
    assert layout.tokens_wanted == 3


@pytest.mark.parametrize("index", [-1, 3, 2**31 - 1])
def test_status_names_a_row_outside_the_table(index: int) -> None:
    layout = step(good_table(), [1, index], [3, 4])
    assert layout.status == (5, 1, 0, index)
    assert layout.tokens_wanted == 3


@pytest.mark.parametrize(("argument", "code"), [("length", 2), ("row", 5)])
def test_status_of_a_value_beyond_int32_does_not_name_another(argument: str, code: int) -> None:
    """The value is cut to what fits; 2**32 + 3 must not read as 3, which is in order."""
    value = 2**32 + 3
    layout = step(good_table(), [value if argument == "row" else 1], [value if argument == "length" else 4])
    assert layout.status[0] == code
    assert layout.status[3] == 2**31 - 1


@pytest.mark.parametrize(("position", "value"), [(4, 9), (5, 8), (7, 12)])
def test_status_names_a_block_that_is_not_one_page(position: int, value: int) -> None:
    """Slots of a block must be consecutive and aligned."""
    table = good_table()
    table[1, position] = value
    layout = step(table, [1], [12], check_blocks=True)
    assert layout.status[:2] == (4, 0)
    assert layout.status[2] // 4 == position // 4


def test_status_of_unchecked_blocks_is_silent() -> None:
    table = good_table()
    table[1, 5] = 0
    assert step(table, [1], [12]).status == (0, 0, 0, 0)


def test_status_is_the_first_violation_in_row_order() -> None:
    table = good_table()
    table[1, 4] = table[2, 0] = -3
    assert step(table, [1, 2], [12, 12]).status == (1, 0, 4, -3)


def test_status_is_forgotten_by_the_next_step() -> None:
    pager = CsrPager(4, num_pages=NUM_PAGES, cost_model=SHARE_ALWAYS)
    rows, lens = torch.tensor([1]), torch.tensor([12])
    bad = good_table()
    bad[1, 0] = -1
    assert pager.step(bad, rows, lens).status[0] == 1
    assert pager.step(good_table(), rows, lens).status == (0, 0, 0, 0)


anything = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=200)
@given(st.data(), st.sampled_from((1, 3, 4, 16)))
def test_pager_of_any_table_stays_in_bounds_and_never_raises(data, page_size: int) -> None:
    ids = st.one_of(st.integers(0, NUM_PAGES * page_size - 1), st.sampled_from((-1, NUM_PAGES * page_size)), anything)
    size = data.draw(st.integers(1, 3))
    table = torch.tensor([[data.draw(ids) for _ in range(WIDTH)] for _ in range(size)], dtype=torch.int32)
    batch = data.draw(st.integers(0, 4))
    rows = [data.draw(st.one_of(st.integers(0, size - 1), st.integers(-2, size + 1), anything)) for _ in range(batch)]
    lens = [data.draw(st.one_of(st.integers(0, WIDTH), st.integers(-2, WIDTH + 2), anything)) for _ in range(batch)]
    layout = step(table, rows, lens, page_size)
    requests, status = oracle.read_requests(
        lambda r, p: table[rows[r], p].item(),
        [(0, n) for n in lens],
        width=WIDTH,
        page_size=page_size,
        num_pages=NUM_PAGES,
        divisor=page_size,
        table_rows=(rows, size),
        may_share=[r != 0 for r in rows],
    )
    assert layout.status == status
    oracle.check_invariants(layout, requests, page_size)
    oracle.assert_equal(layout, oracle.expected_layout(requests, page_size, SHARE_ALWAYS))
    slots = [first + count for first, count in layout.runs.tolist()]
    assert all(0 <= page < NUM_PAGES for page in layout.page_indices.tolist())
    assert max(slots, default=0) <= NUM_PAGES * page_size
