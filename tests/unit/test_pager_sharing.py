"""Small batches whose layout can be checked by eye, and the decision to share or to duplicate."""

from __future__ import annotations

import pytest
import torch
from unit import oracle
from unit.strategies import TYPICAL

from flashcore_sglang.config import SHARE_ALWAYS, CostModel, cost_model
from flashcore_sglang.layout import CsrLayout, CsrPager, build_layout


def build(
    pages: list[list[int]],
    ends: list[int],
    starts: list[int] | None = None,
    page_size: int = 1,
    cost: CostModel = SHARE_ALWAYS,
    resident: torch.Tensor | None = None,
) -> CsrLayout:
    width = max((len(p) for p in pages), default=1)
    table = torch.tensor([p + [-1] * (width - len(p)) for p in pages], dtype=torch.int32).view(len(pages), width)
    return build_layout(
        table.repeat_interleave(page_size, 1),
        torch.tensor(starts or [0] * len(pages), dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int64),
        resident,
        page_tokens=page_size,
        num_pages=1 << 20,
        cost_model=cost,
    )


def segments(layout: CsrLayout) -> list[tuple[list[int], list[int]]]:
    """(rows, positions) of each segment."""
    order = layout.row_order.tolist()
    return [
        (order[a:b], p)
        for (a, b), p in zip(layout.segment_rows.tolist(), layout.segment_positions.tolist(), strict=True)
    ]


def test_layout_of_two_rows_with_a_common_prefix_is_the_documented_one() -> None:
    layout = build([[7, 8, 5], [7, 8, 4]], [10, 11], page_size=4)
    assert oracle.as_lists(layout) == {
        "row_order": [1, 0],
        "segment_rows": [[0, 2], [0, 1], [1, 2]],
        "segment_positions": [[0, 8], [8, 11], [8, 10]],
        "page_indptr": [0, 2, 3, 4],
        "page_indices": [7, 8, 4, 5],
        "run_indptr": [0, 1, 2, 3],
        "runs": [[28, 8], [16, 3], [20, 2]],
        "row_indptr": [0, 2, 4],
        "row_segments": [0, 2, 0, 1],
        "staged_pages": [],
    }
    assert (layout.status, layout.appended, layout.is_complete) == ((0, 0, 0, 0), False, True)
    assert (layout.tokens_stored, layout.tokens_wanted, layout.num_rows, layout.num_segments) == (13, 21, 2, 3)


def test_layout_of_empty_batch_is_empty() -> None:
    layout = build([], [])
    assert layout.num_rows == layout.num_segments == layout.tokens_stored == 0
    assert layout.page_indptr.tolist() == layout.run_indptr.tolist() == layout.row_indptr.tolist() == [0]
    assert layout.segment_rows.shape == layout.segment_positions.shape == layout.runs.shape == (0, 2)


def test_pager_step_of_empty_batch_is_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    layout = CsrPager(16).step(torch.zeros(4, 64, dtype=torch.int32), none, none)
    assert (layout.num_rows, layout.num_segments, layout.is_complete) == (0, 0, True)


def test_layout_of_length_zero_has_no_segment() -> None:
    layout = build([[3], [3], [3]], [0, 1, 0])
    assert segments(layout) == [([1], [0, 1])]
    assert layout.row_order.tolist() == [1, 0, 2]
    assert layout.row_indptr.tolist() == [0, 0, 1, 1]


def test_layout_of_length_one_is_one_segment_of_one_slot() -> None:
    layout = build([[9]], [1], page_size=16)
    assert (segments(layout), layout.runs.tolist()) == ([([0], [0, 1])], [[144, 1]])


def test_layout_of_identical_rows_is_one_segment() -> None:
    assert segments(build([[4, 2]] * 5, [2] * 5)) == [([0, 1, 2, 3, 4], [0, 2])]


def test_layout_puts_a_prefix_before_its_extensions() -> None:
    layout = build([[1, 2, 3], [1], [1, 2]], [3, 1, 2])
    assert segments(layout) == [([1, 2, 0], [0, 1]), ([2, 0], [1, 2]), ([0], [2, 3])]


def test_layout_cuts_a_shared_page_where_the_shorter_row_ends() -> None:
    layout = build([[6, 7], [6, 7]], [20, 18], page_size=16)
    assert segments(layout) == [([1, 0], [0, 18]), ([0], [18, 20])]
    assert layout.page_indices.tolist() == [6, 7, 7]
    assert layout.runs.tolist() == [[96, 18], [114, 2]]


def test_layout_keeps_equal_ids_apart_behind_different_heads() -> None:
    assert segments(build([[1, 5, 6], [2, 5, 6]], [3, 3])) == [([0], [0, 3]), ([1], [0, 3])]


def test_layout_keeps_equal_ids_apart_at_different_depths() -> None:
    assert segments(build([[5, 6], [4, 5, 6]], [2, 3])) == [([1], [0, 3]), ([0], [0, 2])]


def test_layout_finds_several_groups() -> None:
    layout = build([[1, 9], [2, 8], [1, 7], [2, 6]], [2] * 4)
    assert [s for s in segments(layout) if len(s[0]) > 1] == [([2, 0], [0, 1]), ([3, 1], [0, 1])]


def test_layout_joins_consecutive_pages_in_one_run() -> None:
    layout = build([[3, 4, 9, 8]], [64], page_size=16)
    assert layout.runs.tolist() == [[48, 32], [144, 16], [128, 16]]


def test_layout_of_interleaved_slots_has_runs_of_one() -> None:
    layout = build([[1, 3, 5], [2, 4, 6]], [3, 3])
    assert layout.runs.tolist() == [[s, 1] for s in (1, 3, 5, 2, 4, 6)]


def test_layout_of_rows_that_start_inside_a_prefix_shares_from_the_largest_start() -> None:
    layout = build([[1, 2, 3, 4], [-1, -1, 3, 5]], [4, 4], [0, 2])
    assert sorted(segments(layout)) == [([0], [0, 2]), ([0], [3, 4]), ([0, 1], [2, 3]), ([1], [3, 4])]


def test_row_segments_of_a_row_with_a_head_of_its_own_ascend() -> None:
    """Row 1 reads [0, 1) alone and [1, 2) with row 0, which comes first in the order."""
    layout = build([[1], [1]], [2, 2], [1, 0], page_size=3)
    positions = layout.segment_positions[layout.row_segments[layout.row_indptr[1] : layout.row_indptr[2]].long()]
    assert positions.tolist() == [[0, 1], [1, 2]]


def test_staging_cuts_a_segment_and_lists_the_page_once() -> None:
    resident = torch.ones(1 << 20, dtype=torch.bool)
    resident[[2, 77]] = False
    layout = build([[1, 2, 3], [1, 2, 4]], [3, 3], resident=resident)
    assert layout.staged_pages.tolist() == [2]
    assert not layout.is_complete
    assert segments(layout) == [([0, 1], [0, 1]), ([0], [2, 3]), ([1], [2, 3])]


def test_staging_of_every_page_leaves_no_segment() -> None:
    layout = build([[5, 3]], [2], resident=torch.zeros(1 << 20, dtype=torch.uint8))
    assert (layout.num_segments, layout.staged_pages.tolist()) == (0, [3, 5])


COST = CostModel(token_cost=1, segment_cost=6, partial_cost=2)


@pytest.mark.parametrize(("length", "shared"), [(9, False), (10, True), (11, True)])
def test_cost_model_duplicates_a_prefix_that_is_too_short(length: int, shared: bool) -> None:
    """Two rows: length * 1 >= 6 + 2 * 2."""
    common = list(range(100, 100 + length))
    layout = build([[*common, 1], [*common, 2]], [length + 1] * 2, cost=COST)
    assert any(len(rows) == 2 for rows, _ in segments(layout)) == shared


def test_cost_model_folds_a_short_nested_segment_into_its_children() -> None:
    """All four share 20 tokens; two of them 3 more, which is not worth a segment."""
    head = list(range(100, 120))
    layout = build([[*head, 1, 2, 3, 4], [*head, 1, 2, 3, 5], [*head, 6], [*head, 7]], [24, 24, 21, 21], cost=COST)
    assert [s for s in segments(layout) if len(s[0]) > 1] == [([0, 1, 2, 3], [0, 20])]
    assert ([0], [20, 24]) in segments(layout) and ([1], [20, 24]) in segments(layout)


def test_cost_model_keeps_a_child_whose_parent_is_too_short() -> None:
    """The child then reads the parent's positions too."""
    tail = list(range(100, 140))
    layout = build([[1, *tail, 2], [1, *tail, 3], [1, 4]], [42, 42, 2], cost=COST)
    assert [s for s in segments(layout) if len(s[0]) > 1] == [([0, 1], [0, 41])]
    assert ([2], [0, 2]) in segments(layout)


def test_cost_model_counts_children_kept_below_as_one_reader() -> None:
    """Three rows agree on 5 tokens (worth it for three readers: 5 * 2 >= 4 + 3 * 2), two of them on 30 more. Once these
    two read together, only two readers are left, for whom 5 tokens are too few."""
    cost = CostModel(token_cost=1, segment_cost=4, partial_cost=2)
    head, tail = list(range(100, 105)), list(range(200, 230))
    layout = build([[*head, *tail, 1], [*head, *tail, 2], [*head, 3]], [36, 36, 6], cost=cost)
    assert [s for s in segments(layout) if len(s[0]) > 1] == [([0, 1], [0, 35])]
    layout = build([[*head, 1], [*head, 2], [*head, 3]], [6] * 3, cost=cost)
    assert ([0, 1, 2], [0, 5]) in segments(layout)


@pytest.mark.parametrize(("length", "shared"), [(255, False), (256, True)])
def test_typical_cost_model_shares_two_rows_from_256_tokens(length: int, shared: bool) -> None:
    common = list(range(1000, 1000 + length))
    layout = build([[*common, 1], [*common, 2]], [length + 1] * 2, cost=TYPICAL)
    assert (layout.tokens_stored < layout.tokens_wanted) == shared


def test_cost_model_of_configs_is_the_default() -> None:
    common = list(range(1000, 1300))
    pages = torch.tensor([[*common, 1], [*common, 2]], dtype=torch.int32)
    vectors = torch.tensor([0, 0]), torch.tensor([301, 301])
    layout = build_layout(pages, *vectors, page_tokens=1, num_pages=2000)
    want = build_layout(pages, *vectors, page_tokens=1, num_pages=2000, cost_model=cost_model("cpu"))
    oracle.assert_same(layout, want)


@pytest.mark.parametrize("token_cost", [0, 1])
def test_share_always_shares_a_single_token(token_cost: int) -> None:
    layout = build([[1, 2], [1, 3]], [2, 2], cost=CostModel(token_cost=token_cost))
    assert segments(layout)[0] == ([0, 1], [0, 1])
