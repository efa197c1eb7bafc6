"""Step after step of one pager: always the layout of a fresh one, and appended only where nothing old has changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit import oracle
from unit.strategies import TYPICAL, cost_models

from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.layout import CsrLayout, CsrPager

CONTEXT = 40  # positions that a row of the table can hold


class Server:
    """SGLang's side: a table of slots, requests that grow, share and leave, and a pager that is stepped beside it.

    Every step is compared with a pager that has seen nothing before, and with the test's own reading of whether an
    entry that the last step read has changed.
    """

    def __init__(self, page_size: int = 1, cost: CostModel = SHARE_ALWAYS, rows: int = 8) -> None:
        self.page_size, self.cost = page_size, cost
        self.num_pages = 1000
        self.table = torch.zeros(rows + 1, CONTEXT, dtype=torch.int32)
        self.batch: list[int] = []
        self.lens: dict[int, int] = {}
        self.next_page = 1
        self.pager = self.fresh()
        self.before: tuple | None = None

    def fresh(self) -> CsrPager:
        return CsrPager(self.page_size, num_pages=self.num_pages, cost_model=self.cost)

    def set_page(self, row: int, block: int, page: int) -> None:
        at = slice(block * self.page_size, min((block + 1) * self.page_size, CONTEXT))
        self.table[row, at] = page * self.page_size + torch.arange(at.stop - at.start, dtype=torch.int32)

    def append(self, row: int, count: int) -> None:
        for _ in range(min(count, CONTEXT - self.lens[row])):
            if self.lens[row] % self.page_size == 0:
                self.set_page(row, self.lens[row] // self.page_size, self.next_page)
                self.next_page += 1
            self.lens[row] += 1

    def join(self, row: int, length: int, parent: int | None = None, shared: int = 0) -> None:
        """A new request, whose first `shared` pages are those of `parent`."""
        self.lens[row] = 0
        if parent is not None:
            shared = min(shared, self.lens[parent] // self.page_size)
            self.table[row] = self.table[parent]
            self.lens[row] = shared * self.page_size
        self.append(row, length)
        self.batch.append(row)

    def step(self, rows: list[int] | None = None, lens: list[int] | None = None) -> CsrLayout:
        rows = self.batch if rows is None else rows
        lens = [self.lens[r] for r in rows] if lens is None else lens
        arguments = self.table, torch.tensor(rows, dtype=torch.int64), torch.tensor(lens, dtype=torch.int32)
        layout = self.pager.step(*arguments)
        oracle.assert_same(layout, self.fresh().step(*arguments))
        requests, status = oracle.read_requests(
            lambda r, p: self.table[rows[r], p].item(),
            [(0, n) for n in lens],
            width=CONTEXT,
            page_size=self.page_size,
            num_pages=self.num_pages,
            divisor=self.page_size,
            table_rows=(rows, self.table.shape[0]),
            may_share=[r != 0 for r in rows],
        )
        assert layout.status == status
        oracle.check_invariants(layout, requests, self.page_size)
        oracle.assert_equal(layout, oracle.expected_layout(requests, self.page_size, self.cost))
        if layout.appended:
            assert self.before is not None and status == self.before[1] == (0, 0, 0, 0)
            assert [q.may_share for q in requests] == [q.may_share for q in self.before[0]]
            for old, new in zip(self.before[0], requests, strict=True):
                assert new.end >= old.end
                assert old.pages == {b: new.pages[b] for b in old.pages}, "appended to an entry that has changed"
        self.before = requests, status
        return layout


def server(page_size: int = 1, cost: CostModel = SHARE_ALWAYS) -> Server:
    """Three requests: two share 8 tokens, all have some of their own."""
    s = Server(page_size, cost)
    s.join(1, 12)
    s.join(2, 5, parent=1, shared=8 // page_size)
    s.join(3, 3)
    s.step()
    return s


def test_pager_first_step_is_a_rebuild() -> None:
    s = Server()
    s.join(1, 3)
    assert not s.step().appended


@settings(max_examples=60)
@given(st.sampled_from((1, 2, 3, 8, 16)), cost_models(), st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_pager_decode_steps_append(page_size: int, cost: CostModel, counts: list[int]) -> None:
    """One to three tokens per request and step, interleaved between them, across page boundaries."""
    s = server(page_size, cost)
    for count in counts:
        for row in s.batch:
            s.append(row, count)
        assert s.step().appended


def test_pager_appends_different_numbers_of_tokens() -> None:
    s = server()
    for row, count in ((1, 0), (2, 4), (3, 1)):
        s.append(row, count)
    assert s.step().appended


def test_pager_appends_where_nothing_grew() -> None:
    assert server().step().appended


def test_pager_appends_without_sharing() -> None:
    table = torch.arange(40, dtype=torch.int32).view(1, 40).repeat(3, 1)
    pager = CsrPager(1, sharing=False)
    rows = torch.arange(3)
    assert not pager.step(table, rows, torch.tensor([5, 5, 5])).appended
    assert pager.step(table, rows, torch.tensor([6, 6, 6])).appended


def test_pager_with_padding_rows_appends() -> None:
    s = server()
    for _ in range(3):
        for row in s.batch:
            s.append(row, 1)
        layout = s.step([*s.batch, 0, 0], [*(s.lens[r] for r in s.batch), 1, 1])
    assert layout.appended


def test_pager_notices_every_rewritten_slot() -> None:
    """Whatever single old slot moves, the row is rebuilt: the first, the last, and all between."""
    for position in range(12):
        s = server()
        s.set_page(1, position, s.next_page)
        s.append(1, 1)
        assert not s.step().appended, position


def test_pager_notices_a_rewritten_last_page() -> None:
    """The last page is half full: the token that is appended lies in it as well."""
    for page_size in (2, 4, 8):
        s = Server(page_size)
        s.join(1, page_size + 1)
        s.join(2, page_size + 1)
        s.step()
        s.set_page(1, 1, 500)
        s.append(1, 1)
        assert not s.step().appended


def test_pager_notices_old_slots_in_the_hands_of_another_request() -> None:
    """SGLang frees a row's duplicate of a prefix after the first step, and gives its slots to the next request."""
    s = Server(1)
    s.join(1, 10)
    s.join(2, 10)  # the same text, prefilled at the same time: 8 tokens in slots of its own
    s.step()
    freed = s.table[2, :8].clone()
    s.table[2, :8] = s.table[1, :8]
    s.append(1, 1)
    s.append(2, 1)
    s.join(3, 8)
    s.table[3, :8] = freed
    layout = s.step()
    assert not layout.appended
    assert layout.tokens_wanted - layout.tokens_stored == 8


def test_pager_notices_two_rows_that_exchange_slots() -> None:
    s = server()
    s.table[[1, 3], :3] = s.table[[3, 1], :3]
    assert not s.step().appended


def test_pager_notices_a_row_of_the_same_index_and_length_plus_one() -> None:
    """The pool index went to a new request, whose length happens to fit."""
    s = server()
    length = s.lens[3]
    s.batch.remove(3)
    s.join(3, length + 1)
    assert not s.step().appended


def test_pager_notices_reordered_rows() -> None:
    s = server()
    s.batch.reverse()
    assert not s.step().appended


def test_pager_notices_a_request_that_left() -> None:
    s = server()
    s.batch.pop()
    assert not s.step().appended


def test_pager_notices_a_request_that_joined() -> None:
    s = server()
    s.join(4, 2, parent=1, shared=4)
    assert not s.step().appended


@pytest.mark.parametrize("page_size", [1, 4])
def test_pager_notices_a_shorter_row(page_size: int) -> None:
    """At page size 4 the row still ends in the same page."""
    s = server(page_size)
    s.lens[1] -= 1
    assert not s.step().appended


def test_pager_notices_a_row_that_became_padding() -> None:
    s = Server()
    s.join(1, 4)
    s.table[0] = s.table[1]
    s.step([1], [3])
    assert not s.step([0], [4]).appended


def test_pager_rebuilds_where_a_strict_prefix_diverges() -> None:
    """Row 2 is a prefix of row 1; then it goes its own way, and the two share no more than before."""
    s = Server(1)
    s.join(1, 10)
    s.join(2, 0, parent=1, shared=6)
    assert s.step().num_segments == 2
    s.append(2, 1)
    layout = s.step()
    assert not layout.appended
    assert layout.segment_positions.tolist() == [[0, 6], [6, 10], [6, 7]]


def test_pager_rebuilds_where_a_strict_prefix_grows_along_the_longer_row() -> None:
    s = Server(1)
    s.join(1, 10)
    s.join(2, 0, parent=1, shared=6)
    s.step()
    s.lens[2] = 8
    layout = s.step()
    assert not layout.appended
    assert layout.segment_positions.tolist() == [[0, 8], [8, 10]]


def test_pager_rebuilds_where_equal_rows_diverge() -> None:
    s = Server(4)
    s.join(1, 8)
    s.join(2, 0, parent=1, shared=2)
    s.step()
    for row in (2, 1):
        s.append(row, 1)
    layout = s.step()
    assert not layout.appended
    assert layout.num_segments == 3


def test_pager_rebuilds_where_an_unkept_prefix_diverges() -> None:
    """A prefix too short to be shared becomes long enough when both rows grow along the same slots."""
    s = Server(1, CostModel(1, 6, 2))
    s.join(1, 20)
    s.join(2, 0, parent=1, shared=9)
    assert s.step().tokens_stored == 29
    s.lens[2] = 10
    layout = s.step()
    assert not layout.appended
    assert layout.tokens_stored == 20


def test_pager_rebuilds_where_an_empty_row_grows() -> None:
    s = server()
    s.join(4, 0)
    s.step()
    s.append(4, 1)
    assert not s.step().appended


@pytest.mark.parametrize("index", [0, 1], ids=["padding", "no sharing"])
def test_pager_rebuilds_where_an_empty_row_that_never_shares_grows(index: int) -> None:
    """It had no segment that could be made longer."""
    pager = CsrPager(1, sharing=index == 0)
    table, rows = torch.arange(40, dtype=torch.int32).view(1, 40).repeat(2, 1), torch.tensor([index])
    assert pager.step(table, rows, torch.tensor([0])).num_segments == 0
    layout = pager.step(table, rows, torch.tensor([1]))
    assert not layout.appended
    assert layout.segment_positions.tolist() == [[0, 1]]


def test_pager_rebuilds_where_a_clamped_slot_becomes_slot_zero() -> None:
    """The slot that was out of bounds was read as slot 0: no proof that slot 0 was in the table."""
    s = server()
    s.table[1, 3] = -5
    s.step()
    s.table[1, 3] = 0
    assert not s.step().appended


def test_pager_rebuilds_after_a_violated_bound() -> None:
    s = server()
    good = s.table[1, 3].item()
    s.table[1, 3] = -5
    assert s.step().status[0] == 1
    s.append(1, 1)
    layout = s.step()
    assert (layout.status[0], layout.appended) == (1, False)
    s.table[1, 3] = good
    assert not s.step().appended
    s.append(1, 1)
    assert s.step().appended


def test_pager_rebuilds_after_a_range_was_cut() -> None:
    s = server()
    assert s.step(s.batch, [CONTEXT + 3, s.lens[2], s.lens[3]]).status == (2, 0, 0, CONTEXT + 3)
    assert not s.step().appended


def test_pager_keeps_pagers_apart() -> None:
    a, b = server(), Server()
    b.join(3, 7)
    b.step()
    for row in a.batch:
        a.append(row, 1)
    assert a.step().appended


def test_pager_keeps_no_view_of_the_table() -> None:
    """A layout that was handed out does not change with the steps after it."""
    s = server()
    layout = s.step()
    kept = oracle.as_lists(layout)
    for row in s.batch:
        s.append(row, 5)
    s.step()
    s.table.fill_(7)
    assert oracle.as_lists(layout) == kept


@settings(max_examples=150)
@given(st.data(), st.sampled_from((1, 2, 3, 8)), st.sampled_from((SHARE_ALWAYS, TYPICAL, CostModel(1, 4, 1))))
def test_pager_after_any_history_equals_a_fresh_one(data, page_size: int, cost: CostModel) -> None:
    s = Server(page_size, cost)
    s.join(1, data.draw(st.integers(0, 12)))
    actions = ("decode", "decode", "decode", "some", "rewrite", "steal", "join", "leave", "reorder", "shrink", "break")
    for action in data.draw(st.lists(st.sampled_from(actions), min_size=2, max_size=10)):
        row = data.draw(st.sampled_from(s.batch)) if s.batch else None
        if action == "join" or row is None:
            free = [r for r in range(1, 9) if r not in s.batch]
            if free:
                s.join(free[0], data.draw(st.integers(0, 6)), row, data.draw(st.integers(0, 8)))
        elif action == "decode":
            for r in s.batch:
                s.append(r, 1)
        elif action == "some":
            for r in s.batch:
                s.append(r, data.draw(st.integers(0, 3)))
        elif action == "leave":
            s.batch.remove(row)
        elif action == "reorder":
            s.batch = data.draw(st.permutations(s.batch))
        elif action == "shrink":
            s.lens[row] = data.draw(st.integers(0, s.lens[row]))
        elif action in ("rewrite", "steal") and s.lens[row]:
            block = data.draw(st.integers(0, (s.lens[row] - 1) // page_size))
            old = s.table[row, block * page_size].item() // page_size
            s.set_page(row, block, s.next_page)
            s.next_page += 1
            if action == "steal":  # the freed page is the next one of another request
                thief = data.draw(st.sampled_from(s.batch))
                while s.lens[thief] % page_size:
                    s.append(thief, 1)
                if s.lens[thief] < CONTEXT:
                    s.append(thief, 1)
                    s.set_page(thief, (s.lens[thief] - 1) // page_size, old)
        elif action == "break":
            position = data.draw(st.integers(0, CONTEXT - 1))
            kept = s.table[row, position].item()
            s.table[row, position] = data.draw(st.sampled_from((-1, 2**31 - 1, s.num_pages * page_size)))
            s.step()
            s.table[row, position] = kept
        s.step()
