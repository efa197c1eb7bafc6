"""Sliding windows and trees of drafts: the plan in PyTorch and the tables of a GPU, against the definition.

K and V outside of what some query sees are NaN: SGLang has freed them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import Batch, forests
from unit.test_attention import MIXED, TINY, Case, forest, make
from unit.window_cases import check, check_mask, random_case

from flashcore_sglang import ops, reference
from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.reach import Reach

WINDOWS = (0, 1, 4, 15, 16, 30, 4096)


def free_below(case: Case, window_left: int) -> Case:
    """The case with NaN in every slot that no window reaches."""
    seen = torch.zeros(len(case.k), dtype=torch.bool)
    for row, (end, count) in enumerate(zip(case.batch.ends, case.q_lens, strict=True)):
        if count:
            seen[case.owned(row)[max(0, end - count - window_left) :]] = True
    nan = torch.where(seen, 0.0, torch.nan)[:, None, None]
    return replace(case, k=case.k + nan, v=case.v + nan)


def through(case: Case, slot_map: torch.Tensor) -> Case:
    """The case with K and V where ``slot_map`` says."""
    k, v = torch.full_like(case.k, torch.nan), torch.full_like(case.v, torch.nan)
    k[slot_map], v[slot_map] = case.k, case.v
    return replace(case, k=k, v=v)


def planned(
    case: Case, *, window_left: int = -1, chunk: int = 0, causal: bool = True, **options: object
) -> torch.Tensor:
    _, lens, q_lens = case.vectors
    plan = ops.plan(case.layout(), lens, q_lens, reach=Reach(window_left, chunk, not causal), **options)
    return ops.attend(case.q, case.k, case.v, plan, scale=case.scale, sinks=case.sinks)


def defined(case: Case, **options: object) -> torch.Tensor:
    """The definition, which reads every slot: those that it hides hold zeros for it."""
    indices, lens, q_lens = case.vectors
    k, v = case.k.nan_to_num(0.0), case.v.nan_to_num(0.0)
    size = case.batch.page_size
    return reference.extend(
        case.q, k, v, case.table, indices, lens, q_lens, page_size=size, scale=case.scale, sinks=case.sinks, **options
    )


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, atol=10 * TINY[got.dtype], rtol=1e-5)


@pytest.mark.parametrize("q_lens", [None, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("window_left", WINDOWS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_window_reads_nothing_below_it(page_size, window_left, q_lens):
    case = free_below(make(forest(page_size), q_lens, sinks=torch.tensor([0.0, 1.0, -1.0, 2.0])), window_left)
    close(planned(case, window_left=window_left), defined(case, window_left=window_left))


@given(forests(min_rows=1, page_sizes=(1, 3, 16)), st.sampled_from((1, 5, 16, 40)), st.data())
def test_chunks_of_any_batch_equal_the_definition(batch: Batch, chunk: int, data: st.DataObject):
    case = make(batch, [data.draw(st.integers(0, end)) for end in batch.ends], dim=8)
    close(planned(case, chunk=chunk), defined(case, chunk=chunk))


@given(forests(min_rows=1, page_sizes=(1, 3, 16)), st.sampled_from(WINDOWS), st.data())
def test_window_of_any_batch_equals_the_definition(batch: Batch, window_left: int, data: st.DataObject):
    q_lens = [data.draw(st.integers(0, end)) for end in batch.ends]
    case = free_below(make(batch, q_lens, dim=8), window_left)
    close(planned(case, window_left=window_left), defined(case, window_left=window_left))


@pytest.mark.parametrize("q_lens", [MIXED, [70, 64, 33, 90, 17, 1]], ids=["mixed", "whole"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_encoder_layers_see_ahead(page_size, q_lens):
    case = make(forest(page_size), q_lens)
    close(planned(case, causal=False), defined(case, causal=False))


@pytest.mark.parametrize("window_left", [-1, 20])
def test_slots_of_another_pool(window_left):
    case = make(forest(1), MIXED)
    slot_map = torch.randperm(len(case.k), generator=torch.Generator().manual_seed(3))
    moved = through(case, slot_map)
    options = {"window_left": window_left}
    close(planned(moved, slot_map=slot_map, **options), defined(case, **options))


def test_slots_outside_of_the_map_are_read_as_padding():
    case = make(forest(1), [1] * 6)
    case.k[0] = case.v[0] = 0.0
    assert planned(case, slot_map=torch.zeros(3, dtype=torch.int64)).isfinite().all()


def tree_mask(case: Case, seed: int = 0) -> torch.Tensor:
    """For each row the prefix, each draft itself, and a random choice of the drafts before it."""
    g, parts = torch.Generator().manual_seed(seed), []
    for end, count in zip(case.batch.ends, case.q_lens, strict=True):
        drafts = torch.tril(torch.rand(count, count, generator=g) < 0.5) | torch.eye(count, dtype=torch.bool)
        parts.append(torch.cat([torch.ones(count, end - count, dtype=torch.bool), drafts], 1).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("q_lens", [[8] * 6, [7, 3, 0, 40, 17, 1]], ids=["all prefixes", "a whole prompt"])
def test_tree_of_drafts_equals_the_definition(q_lens):
    case = make(forest(ends=(70, 64, 33, 90, 17, 8)), q_lens)
    mask = tree_mask(case)
    close(planned(case, custom_mask=mask), defined(case, custom_mask=mask))


@pytest.mark.parametrize("options", [{"window_left": 0}, {"window_left": 20}, {"chunk": 16}], ids=str)
def test_tree_with_a_window_or_chunks_equals_the_definition(options):
    case = make(forest(ends=(70, 64, 33, 90, 17, 8)), [8] * 6)
    mask = tree_mask(case)
    close(planned(case, custom_mask=mask, **options), defined(case, custom_mask=mask, **options))


def test_tree_of_an_encoder_is_refused():
    case = make(forest(), [1] * 6)
    with pytest.raises(ValueError, match="custom_mask: want a decoder's layers, got an encoder's"):
        planned(case, custom_mask=tree_mask(case), causal=False)


@pytest.mark.parametrize("reach", [Reach(0), Reach(20), Reach(4096), Reach(chunk=16)], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("static", [False, True])
def test_mask_is_cut_to_what_a_window_reaches(page_size, reach, static):
    case = make(forest(page_size, ends=(70, 64, 33, 90, 17, 8)), [8] * 6)
    mask, (indices, lens, counts) = tree_mask(case), case.vectors
    window = DeviceWindow(
        page_size, reach=reach, max_rows=64, max_queries=8, max_tokens=96, num_pages=case.batch.num_pages, device="cpu"
    )
    if static:
        window.make_mask(6)
    before = window._mask.data_ptr()
    window.snapshot(case.table, indices, lens, q_lens=counts, num_tokens=48, max_queries=8)
    window.take_mask(mask)
    assert (window.mask.data_ptr() == before) == static
    want, at = [], 0
    for end in case.batch.ends:
        of_request = mask[at : at + 8 * end].view(8, end)
        at += 8 * end
        chunk = reach.chunk or end
        for begin in range((end - 8) // chunk * chunk, end, chunk):
            base = begin if reach.chunk else max(0, end - 8 - reach.left) // page_size * page_size
            stop = min(end, begin + chunk) if reach.chunk else end
            want.append(of_request[max(begin, end - 8) - (end - 8) if reach.chunk else 0 : stop - (end - 8), base:stop])
    got = window.mask[: sum(x.numel() for x in want)]
    assert torch.equal(got, torch.cat([x.flatten() for x in want]))


def pages_of(window: DeviceWindow, row: int, num_rows: int) -> tuple[list[int], list[int]]:
    """Slots that a kernel reads for a row of the last snapshot, and where they begin, counted from its base."""
    layout = window.layout(num_rows)
    begin, end = layout.segment_positions[row].tolist()
    first = int(layout.segment_entries[row])
    size = window.page_size
    return [int(layout.table[first + p // size]) * size + p % size for p in range(begin, end)], [begin, end]


@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("window_left", WINDOWS)
@pytest.mark.parametrize("q_lens", [None, MIXED], ids=["decode", "mixed"])
def test_tables_of_a_window_hold_what_it_reaches(page_size, window_left, q_lens, translated):
    case = make(forest(page_size), q_lens)
    table, (indices, lens, counts) = case.table, case.vectors
    blocks = torch.randperm(case.batch.num_pages, generator=torch.Generator().manual_seed(1))
    slot_map = (blocks[:, None] * page_size + torch.arange(page_size)).flatten() if translated else None
    window = DeviceWindow(
        page_size,
        reach=Reach(window_left),
        max_rows=8,
        max_queries=1,
        max_tokens=table.shape[1],
        num_pages=case.batch.num_pages,
        device="cpu",
    )
    window.snapshot(
        table,
        indices,
        lens,
        q_lens=None if q_lens is None else counts,
        num_tokens=sum(case.q_lens),
        max_queries=max(case.q_lens),
        slot_map=slot_map,
    )
    assert int(window.layout(6).sizes[0]) == 6
    for row, (end, count) in enumerate(zip(case.batch.ends, case.q_lens, strict=True)):
        first = max(0, end - count - window_left)
        slots, (begin, length) = pages_of(window, row, 6)
        want = case.owned(row)[first:]
        assert slots == (want if slot_map is None else slot_map[want]).tolist()
        assert begin == first % page_size and length == int(window.lens[row])
        assert int(window.q_lens[row]) == count
        assert -(-length // page_size) <= window.table_stride


@pytest.mark.parametrize("q_lens", [None, MIXED, [70, 64, 33, 90, 17, 1]], ids=["decode", "mixed", "prompts"])
@pytest.mark.parametrize("chunk", [16, 32, 128])
@pytest.mark.parametrize("page_size", [1, 16])
def test_tables_of_chunks_have_a_row_for_each_chunk(page_size, chunk, q_lens):
    case = make(forest(page_size), q_lens)
    table, (indices, lens, counts) = case.table, case.vectors
    window = DeviceWindow(
        page_size,
        reach=Reach(chunk=chunk),
        max_rows=64,
        max_queries=1,
        max_tokens=table.shape[1],
        num_pages=case.batch.num_pages,
        device="cpu",
    )
    tokens = sum(case.q_lens)
    window.snapshot(
        table,
        indices,
        lens,
        q_lens=None if q_lens is None else counts,
        num_tokens=tokens,
        max_queries=max(case.q_lens),
    )
    want = []
    for row, (end, count) in enumerate(zip(case.batch.ends, case.q_lens, strict=True)):
        for begin in range((end - count) // chunk * chunk, end, chunk) if count else ():
            stop = min(end, begin + chunk)
            want.append((case.owned(row)[begin:stop].tolist(), stop - max(begin, end - count)))
    assert window.num_rows >= len(want) and int(window.q_lens.sum()) == tokens
    for i in range(window.num_rows):
        slots, _ = pages_of(window, i, window.num_rows)
        assert (slots, int(window.q_lens[i])) == (want[i] if i < len(want) else ([], 0))
        assert int(window.lens[i]) == len(slots)


@pytest.mark.parametrize("reach", [Reach(), Reach(chunk=24)])
def test_reach_that_has_no_table_is_refused(reach):
    with pytest.raises(ValueError, match="reach: want a window, or chunks of whole pages of 16 tokens"):
        DeviceWindow(16, reach=reach, max_rows=4, max_queries=1, max_tokens=32, num_pages=10, device="cpu")


def test_window_and_chunks_at_once_are_refused():
    with pytest.raises(ValueError, match="reach: want a window, chunks or all"):
        Reach(4, 16)


def test_tables_stay_in_bounds_whatever_sglang_holds():
    window = DeviceWindow(1, reach=Reach(7), max_rows=4, max_queries=1, max_tokens=32, num_pages=10, device="cpu")
    table = torch.full((3, 32), 2**30, dtype=torch.int32)
    table[1] = -5
    window.snapshot(table, torch.tensor([1, 99, -3]), torch.tensor([1000, -4, 32]), slot_map=torch.tensor([9, 11, -1]))
    layout = window.layout(3)
    assert int(layout.table.min()) >= 0 and int(layout.table.max()) < 10
    assert layout.segment_positions[:3].tolist() == [[0, 8], [0, 0], [0, 8]]
    with pytest.raises(ValueError, match=r"req_pool_indices: want 1 \.\. 4 rows, got 5"):
        window.snapshot(table, torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64))


@pytest.mark.parametrize("seed", range(300))
def test_tables_of_any_step_are_those_wanted(seed):
    case = random_case(seed)
    window = case.window()
    case.snapshot(window)
    check(case, window)
    if len(case.wanted()) <= window.num_rows:
        check_mask(case, window)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_outside_of_the_map_are_not_looked_up(dtype):
    """What lies around the map would be pages of the pool."""
    slot_map = torch.arange(20, 40, dtype=dtype)[8:12]
    table = torch.tensor([[-1, 0, 3, 4, -(2**31), 2**31 - 1, -8, 2]], dtype=torch.int32)
    window = DeviceWindow(1, reach=Reach(7), max_rows=1, max_queries=1, max_tokens=8, num_pages=64, device="cpu")
    window.snapshot(table, torch.zeros(1, dtype=dtype), torch.full((1,), 8, dtype=dtype), slot_map=slot_map)
    assert window.layout(1).table.tolist() == [0, 28, 31, 0, 0, 0, 0, 30]


def test_captured_steps_read_the_same_memory_after_a_longer_one():
    window = DeviceWindow(1, reach=Reach(3), max_rows=4, max_queries=1, max_tokens=32, num_pages=64, device="cpu")
    table = torch.arange(64, dtype=torch.int32).view(2, 32)
    one = torch.tensor([1])
    window.snapshot(table, one, torch.tensor([20]))
    before = window.layout(1)
    window.snapshot(table, one, torch.tensor([20]), q_lens=torch.tensor([9]), num_tokens=9, max_queries=9)
    long = window.layout(1).table
    assert long.data_ptr() != before.table.data_ptr()
    window.snapshot(table, one, torch.tensor([21]))
    after = window.layout(1)
    assert after.table.data_ptr() == before.table.data_ptr()
    assert after.segment_entries.data_ptr() == before.segment_entries.data_ptr()
    assert after.table[:4].tolist() == [49, 50, 51, 52]
    window.snapshot(table, one, torch.tensor([20]), q_lens=torch.tensor([8]), num_tokens=8, max_queries=8)
    assert window.layout(1).table.data_ptr() == long.data_ptr()  # nothing is allocated again


@pytest.mark.parametrize("page_size", [1, 16])
def test_room_for_a_prefill_does_not_grow_with_the_batch(page_size):
    def entries(max_extend: int) -> int:
        window = DeviceWindow(
            page_size, reach=Reach(255), max_rows=64, max_queries=1, max_tokens=8192, num_pages=99, device="cpu",
            max_extend=max_extend,
        )  # fmt: skip
        lens, q_lens = torch.full((64,), 5000), torch.ones(64, dtype=torch.int64)
        q_lens[7] = 4096 - 63
        table, rows = torch.zeros(1, 8192, dtype=torch.int32), torch.zeros(64, dtype=torch.int64)
        window.snapshot(table, rows, lens, q_lens=q_lens, num_tokens=4096, max_queries=4033)
        return window.layout(64).table.numel()

    assert entries(4096) == entries(0) == 64 * (1 + -(-255 // page_size) + (page_size > 1)) + 4096 // page_size


@pytest.mark.parametrize(
    "change, message",
    [
        ({"req_to_token": torch.zeros(2, 8)}, r"req_to_token: want \[pool, max_context\] int32 with stride 1"),
        ({"seq_lens": torch.ones(3).long()}, "seq_lens: want 2 entries, one per request, got 3"),
        ({"seq_lens": torch.ones(2)}, r"seq_lens: want contiguous \[B\] int32 or int64"),
        ({"q_lens": torch.ones(1).long()}, "q_lens: want 2 entries, one per request, got 1"),
        ({"slot_map": torch.ones(0).long()}, "slot_map: want slots, got none"),
        ({"slot_map": torch.ones(4)}, r"slot_map: want contiguous \[B\] int32 or int64"),
    ],
)
def test_argument_that_does_not_fit_is_named(change, message):
    window = DeviceWindow(1, reach=Reach(3), max_rows=4, max_queries=1, max_tokens=8, num_pages=9, device="cpu")
    two = torch.ones(2, dtype=torch.int64)
    arguments = {"req_to_token": torch.zeros(2, 8, dtype=torch.int32), "req_pool_indices": two, "seq_lens": two}
    with pytest.raises(ValueError, match=message):
        window.snapshot(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"page_size": 12}, "page_size: want a power of two up to 1024, got 12"),
        ({"max_rows": 2000}, r"max_rows: want 1 \.\. 1024, got 2000"),
    ],
)
def test_size_that_is_not_served_is_named(change, message):
    sizes = {"page_size": 1, "max_rows": 4, "max_queries": 1, "max_tokens": 8, "num_pages": 9} | change
    with pytest.raises(ValueError, match=message):
        DeviceWindow(reach=Reach(3), device="cpu", **sizes)
