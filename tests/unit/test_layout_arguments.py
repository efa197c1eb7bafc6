"""Every refusal of layout.py and config.py: the argument, the rule and the value that came."""

from __future__ import annotations

import re

import pytest
import torch

from flashcore_sglang.config import CostModel
from flashcore_sglang.layout import CsrLayout, CsrPager, build_layout, build_layout_from_slots


def build(**changes: object) -> CsrLayout:
    """Two rows of four pages of 4 tokens; all in order."""
    arguments = {
        "token_to_page": torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], dtype=torch.int32).repeat_interleave(4, 1),
        "seq_starts": torch.tensor([0, 3]),
        "seq_ends": torch.tensor([16, 10]),
        "page_tokens": 4,
        "num_pages": 40,
    }
    return build_layout(**{**arguments, **changes})


def from_slots(**changes: object) -> CsrLayout:
    arguments = {
        "req_to_token": torch.arange(16, dtype=torch.int32).repeat(3, 1),
        "req_pool_indices": torch.tensor([1, 2]),
        "seq_lens": torch.tensor([16, 10]),
        "page_size": 4,
    }
    return build_layout_from_slots(**{**arguments, **changes})


def says(argument: str, rule: str, value: str) -> str:
    return f"^{re.escape(argument)}: want {re.escape(rule)}, got {re.escape(value)}"


def changed(row: int, position: int, value: int) -> torch.Tensor:
    table = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], dtype=torch.int32).repeat_interleave(4, 1)
    table[row, position] = value
    return table


def test_build_layout_accepts_good_arguments() -> None:
    assert build().status == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["token_to_page", "seq_starts", "seq_ends", "page_resident_bitmap"])
def test_list_in_the_place_of_a_tensor_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: want .*, got list$"):
        build(**{name: [1, 2]})


def test_build_layout_from_slots_accepts_good_arguments() -> None:
    assert from_slots().status == (0, 0, 0, 0)


@pytest.mark.parametrize("value", [0, -4, 1.5, None, "16"])
def test_page_tokens_of_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=says("page_tokens", "an integer, 1 to 1048576", repr(value))):
        build(page_tokens=value)


@pytest.mark.parametrize("value", [0, -4, 1.5, None])
def test_page_size_of_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=says("page_size", "an integer, 1 to 1048576", repr(value))):
        from_slots(page_size=value)


@pytest.mark.parametrize("value", [0, -1, None, 4.5])
def test_num_pages_of_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=says("num_pages", "an integer, 1 to 536870912", repr(value))):
        build(num_pages=value)


@pytest.mark.parametrize("value", [0, -1])
def test_pager_with_num_pages_below_one_is_refused(value: int) -> None:
    """0 is no pool, and not "unbounded", which is None."""
    with pytest.raises(ValueError, match=r"^num_pages: want"):
        CsrPager(4, num_pages=value)


def test_num_pages_whose_slots_exceed_int32_is_refused() -> None:
    """Slots are int32: page 2**29 - 1 of 4 tokens is the last that can be named."""
    table = torch.full((2, 16), 2**30, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^num_pages: want"):
        build(token_to_page=table, num_pages=2**30 + 1)


@pytest.mark.parametrize(
    ("table", "got"),
    [
        (torch.zeros(2, 16, dtype=torch.int64), "[2, 16] int64 on cpu"),
        (torch.zeros(16, dtype=torch.int32), "[16] int32 on cpu"),
        (torch.zeros(2, 2, 2, 2, dtype=torch.int32), "[2, 2, 2, 2] int32 on cpu"),
        (torch.zeros(2, 16, dtype=torch.int32, device="meta"), "[2, 16] int32 on meta"),
    ],
)
def test_token_to_page_of_another_kind_is_refused(table: torch.Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=says("token_to_page", "an int32 CPU tensor of 2 or 3 dimensions", got)):
        build(token_to_page=table)


def test_token_to_page_of_another_page_size_is_refused() -> None:
    pages = torch.zeros(2, 4, 1, dtype=torch.int32).expand(-1, -1, 8)
    with pytest.raises(
        ValueError, match=says("token_to_page", "last dimension 4 (page_tokens) of stride 0", "8 of stride 0")
    ):
        build(token_to_page=pages)


def test_token_to_page_with_an_id_per_position_in_pages_is_refused() -> None:
    with pytest.raises(
        ValueError, match=says("token_to_page", "last dimension 4 (page_tokens) of stride 0", "4 of stride 1")
    ):
        build(token_to_page=torch.zeros(2, 4, 4, dtype=torch.int32))


@pytest.mark.parametrize("name", ["seq_starts", "seq_ends"])
@pytest.mark.parametrize(
    ("vector", "got"),
    [
        (torch.zeros(2), "[2] float32 on cpu"),
        (torch.zeros(2, 1, dtype=torch.int32), "[2, 1] int32 on cpu"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "[2] int64 on meta"),
    ],
)
def test_range_vector_of_another_kind_is_refused(name: str, vector: torch.Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=says(name, "a [B] int32 or int64 CPU tensor", got)):
        build(**{name: vector})


@pytest.mark.parametrize("name", ["seq_starts", "seq_ends"])
def test_range_vector_of_another_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=says(name, "2 entries, one per row", "3")):
        build(**{name: torch.zeros(3, dtype=torch.int64)})


@pytest.mark.parametrize("name", ["req_pool_indices", "seq_lens"])
def test_request_vector_of_another_dtype_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=says(name, "a [B] int32 or int64 CPU tensor", "[2] int16 on cpu")):
        from_slots(**{name: torch.zeros(2, dtype=torch.int16)})


def test_seq_lens_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=says("seq_lens", "2 entries, one per row", "1")):
        from_slots(seq_lens=torch.tensor([3]))


@pytest.mark.parametrize(
    ("table", "got"),
    [
        (torch.zeros(3, 16, dtype=torch.int64), "[3, 16] int64 on cpu"),
        (torch.zeros(16, dtype=torch.int32), "[16] int32 on cpu"),
        (torch.zeros(3, 16, dtype=torch.int32, device="meta"), "[3, 16] int32 on meta"),
    ],
)
def test_req_to_token_of_another_kind_is_refused(table: torch.Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=says("req_to_token", "a [pool, max_context] int32 CPU tensor", got)):
        from_slots(req_to_token=table)


@pytest.mark.parametrize(
    ("bitmap", "got"),
    [
        (torch.ones(39, dtype=torch.bool), "[39] bool on cpu"),
        (torch.ones(40), "[40] float32 on cpu"),
        (torch.ones(1, dtype=torch.int32), "[1] int32 on cpu"),
        (torch.ones(40, 1, dtype=torch.uint8), "[40, 1] uint8 on cpu"),
        (torch.ones(40, dtype=torch.bool, device="meta"), "[40] bool on meta"),
    ],
)
def test_page_resident_bitmap_of_another_kind_is_refused(bitmap: torch.Tensor, got: str) -> None:
    rule = "[40] bool or uint8, or [2] int32 of packed bits, on the CPU"
    with pytest.raises(ValueError, match=says("page_resident_bitmap", rule, got)):
        build(page_resident_bitmap=bitmap)


@pytest.mark.parametrize("value", [-1, 40, 2**31 - 1])
def test_page_id_outside_the_pool_is_refused(value: int) -> None:
    got = f"{value} at row 1, position 4"
    with pytest.raises(ValueError, match=says("token_to_page", "0 <= page < 40", got)):
        build(token_to_page=changed(1, 4, value))


def test_page_id_outside_the_pool_is_named_where_the_range_begins() -> None:
    with pytest.raises(ValueError, match=says("token_to_page", "0 <= page < 40", "40 at row 1, position 3")):
        build(token_to_page=changed(1, 3, 40))


def test_slot_outside_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match=says("req_to_token", "0 <= slot < 12", "12 at row 0, position 12")):
        from_slots(num_pages=3)


def test_negative_slot_is_refused_without_a_bound() -> None:
    table = torch.arange(16, dtype=torch.int32).repeat(3, 1)
    table[2, 8] = -2
    with pytest.raises(ValueError, match=says("req_to_token", "slot >= 0", "-2 at row 1, position 8")):
        from_slots(req_to_token=table)


def test_range_beyond_the_table_is_refused() -> None:
    rule = "at most 16, the positions the table can hold"
    with pytest.raises(ValueError, match=says("seq_ends", rule, "17 at row 0")):
        build(seq_ends=torch.tensor([17, 3]))


def test_range_beyond_a_table_of_pages_is_refused() -> None:
    pages = torch.zeros(2, 3, 1, dtype=torch.int32).expand(-1, -1, 4)
    with pytest.raises(
        ValueError, match=says("seq_ends", "at most 12, the positions the table can hold", "13 at row 1")
    ):
        build(token_to_page=pages, seq_ends=torch.tensor([12, 13]))


def test_length_beyond_the_table_is_refused() -> None:
    with pytest.raises(
        ValueError, match=says("seq_lens", "at most 16, the positions the table can hold", "17 at row 1")
    ):
        from_slots(seq_lens=torch.tensor([1, 17]))


def test_range_beyond_int32_is_refused_by_a_true_value() -> None:
    with pytest.raises(ValueError, match=r"^seq_ends: want at most 16.* got (4294967299|2147483647) at row 0"):
        build(seq_ends=torch.tensor([2**32 + 3, 3]))


def test_start_past_the_end_is_refused() -> None:
    rule = "0 <= start <= end"
    with pytest.raises(ValueError, match=says("seq_starts, seq_ends", rule, "start 11, end 10 at row 1")):
        build(seq_starts=torch.tensor([0, 11]))


def test_negative_start_is_refused() -> None:
    rule = "0 <= start <= end"
    with pytest.raises(ValueError, match=says("seq_starts, seq_ends", rule, "start -1, end 16 at row 0")):
        build(seq_starts=torch.tensor([-1, 0]))


def test_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^seq_lens.*: want .*, got .*-1 at row 0"):
        from_slots(seq_lens=torch.tensor([-1, 3]))


def test_block_of_two_pages_is_refused() -> None:
    rule = "one aligned page per block of positions"
    with pytest.raises(ValueError, match=says("token_to_page", rule, "id 9 at row 0, position 6")):
        build(token_to_page=changed(0, 6, 9))


def test_block_of_two_pages_outside_the_range_is_accepted() -> None:
    assert build(token_to_page=changed(1, 2, 9)).num_segments == build().num_segments


def test_slots_that_are_not_aligned_are_refused() -> None:
    table = torch.arange(1, 17, dtype=torch.int32).repeat(3, 1)
    rule = "one aligned page per block of positions"
    with pytest.raises(ValueError, match=says("req_to_token", rule, "id 1 at row 0, position 0")):
        from_slots(req_to_token=table)


@pytest.mark.parametrize("value", [-1, 3])
def test_request_outside_the_table_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=says("req_pool_indices", "a row of req_to_token", f"{value} at row 1")):
        from_slots(req_pool_indices=torch.tensor([1, value]))


@pytest.mark.parametrize("name", ["token_cost", "segment_cost", "partial_cost"])
@pytest.mark.parametrize("value", [-1, 0.5, "1"])
def test_cost_model_of_no_natural_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=says(name, "an integer, 0 <= cost <= 1073741824", repr(value))):
        CostModel(**{name: value})


@pytest.mark.parametrize("name", ["token_cost", "segment_cost", "partial_cost"])
def test_cost_model_whose_products_exceed_int64_is_refused(name: str) -> None:
    """Two rows of a partial_cost of 2**62 would cost -2**63, and be shared."""
    with pytest.raises(ValueError, match=rf"^{name}: want"):
        CostModel(**{name: 2**62})


def test_empty_vectors_that_are_strided_are_accepted() -> None:
    """What slicing a [0, 2] tensor gives."""
    none = torch.empty(0, 2, dtype=torch.int64)[:, 0]
    assert build(token_to_page=torch.empty(0, 16, dtype=torch.int32), seq_starts=none, seq_ends=none).num_rows == 0
    assert from_slots(req_pool_indices=none, seq_lens=none).num_rows == 0


@pytest.mark.parametrize("num_pages", [7, 40])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_page_resident_bitmap_that_is_strided_is_accepted(dtype: torch.dtype, num_pages: int) -> None:
    size = (num_pages + 31) // 32 if dtype == torch.int32 else num_pages
    bitmap = torch.full((size, 2), -1 if dtype == torch.int32 else 1, dtype=dtype)
    bitmap[:, 1] = 0
    assert build(page_resident_bitmap=bitmap[:, 0], num_pages=num_pages).is_complete
    assert not build(page_resident_bitmap=bitmap[:, 1], num_pages=num_pages).is_complete
