"""What the pager must answer, worked out the slow and obvious way, and what any right answer has in common.

``expected_layout`` follows the definition of the layout with dicts and a trie; it shares no idea with csrc/pager, which
sorts and compares neighbours. ``check_invariants`` knows nothing of how segments are chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from flashcore_sglang.config import CostModel
from flashcore_sglang.layout import CsrLayout

FIELDS = (
    "row_order",
    "segment_rows",
    "segment_positions",
    "page_indptr",
    "page_indices",
    "run_indptr",
    "runs",
    "row_indptr",
    "row_segments",
    "staged_pages",
)


@dataclass(frozen=True)
class Request:
    """Positions [start, end) of a row and the page of each block that they touch."""

    start: int
    end: int
    pages: dict[int, int]
    may_share: bool = True

    def slots(self, page_size: int) -> list[int]:
        return [self.pages[p // page_size] * page_size + p % page_size for p in range(self.start, self.end)]


def read_requests(
    id_at: Callable[[int, int], int],
    ranges: Sequence[tuple[int, int]],
    *,
    width: int,
    page_size: int,
    num_pages: int,
    divisor: int = 1,
    table_rows: tuple[Sequence[int], int] | None = None,
    may_share: Sequence[bool] | None = None,
) -> tuple[list[Request], tuple[int, int, int, int]]:
    """Requests as the pager must understand them, and the status, of a table that may hold anything.

    ``id_at(row, position)`` is called inside the ranges and the table only. Ranges are judged before ids, rows in
    order.
    """
    violations: list[tuple[int, int, int, int]] = []
    cut = []
    for row, (start, end) in enumerate(ranges):
        if table_rows is not None and not 0 <= table_rows[0][row] < table_rows[1]:
            violations.append((5, row, 0, table_rows[0][row]))
            start = end = 0
        elif start < 0 or end < start:
            violations.append((3, row, start, end))
            start = end = 0
        elif end > width:
            violations.append((2, row, 0, end))
            start, end = min(start, width), width
        cut.append((start, end))
    requests = []
    for row, (start, end) in enumerate(cut):
        pages: dict[int, int] = {}
        for position in range(start, end):
            if position // page_size not in pages:
                value = id_at(row, position)
                if not (value >= 0 and value // divisor < num_pages):
                    violations.append((1, row, position, value))
                    value = 0
                pages[position // page_size] = value // divisor
        requests.append(Request(start, end, pages, may_share is None or may_share[row]))
    return requests, violations[0] if violations else (0, 0, 0, 0)


@dataclass
class _Node:
    """Rows that agree on all positions before `depth`, and on no more."""

    rows: list[int]
    depth: int
    parent: _Node | None
    single_rows: int = 0  # rows that are in no child
    children: list[_Node] = field(default_factory=list)
    tops: int = 0
    kept: bool = False


def expected_layout(
    requests: Sequence[Request], page_size: int, cost: CostModel, missing: frozenset[int] = frozenset()
) -> dict[str, list]:
    """Every field of the layout as nested lists."""
    sequences, roots = _complete(requests, page_size)
    sharing = sorted(
        sequences, key=lambda r: (roots[r], [p for _, p in sorted(sequences[r].items())], requests[r].end, r)
    )
    order = sharing + [r for r in range(len(requests)) if r not in sequences]
    place = {row: k for k, row in enumerate(order)}

    nodes = _trie(requests, sequences, roots, sharing, page_size)
    for node in reversed(nodes):  # children come after their parents
        node.tops = node.single_rows + sum(child.tops for child in node.children)
        begin = max(node.parent.depth if node.parent else 0, max(requests[r].start for r in node.rows))
        length = node.depth - begin
        gain = length * (node.tops - 1) * cost.token_cost
        node.kept = length > 0 and gain >= cost.segment_cost + len(node.rows) * cost.partial_cost
        if node.kept:
            node.tops = 1

    # Every row walks down through the kept nodes it belongs to.
    segments: dict[tuple[int, int], tuple[int, int, list[int]]] = {}
    reached = {row: request.start for row, request in enumerate(requests)}
    for node in nodes:
        if not node.kept:
            continue
        above = node.parent
        while above is not None and not above.kept:
            above = above.parent
        begin = max([requests[r].start for r in node.rows] + ([above.depth] if above else []))
        first = min(place[r] for r in node.rows)
        assert sorted(place[r] for r in node.rows) == list(range(first, first + len(node.rows)))
        for row in node.rows:
            if reached[row] < begin:
                assert above is None
                segments[place[row], reached[row]] = (reached[row], begin, [row])
            reached[row] = node.depth
        assert (first, begin) not in segments
        segments[first, begin] = (begin, node.depth, node.rows)
    for row, request in enumerate(requests):
        if reached[row] < request.end:
            segments[place[row], reached[row]] = (reached[row], request.end, [row])

    out: dict[str, list] = {name: [] for name in FIELDS}
    out["row_order"], out["page_indptr"], out["run_indptr"] = order, [0], [0]
    of_row = defaultdict(list)
    for (first, _), (begin, end, rows) in sorted(segments.items()):
        for part in _resident_parts(requests[rows[0]], begin, end, page_size, missing):
            for row in rows:
                of_row[row].append((part[0], len(out["segment_rows"])))
            out["segment_rows"].append([first, first + len(rows)])
            out["segment_positions"].append([part[0], part[-1] + 1])
            pages = requests[rows[0]].pages
            out["page_indices"] += [pages[b] for b in range(part[0] // page_size, part[-1] // page_size + 1)]
            out["runs"] += runs_of([pages[p // page_size] * page_size + p % page_size for p in part])
            out["page_indptr"].append(len(out["page_indices"]))
            out["run_indptr"].append(len(out["runs"]))
    out["row_indptr"] = [0]
    for row in range(len(requests)):
        out["row_segments"] += [segment for _, segment in sorted(of_row[row])]
        out["row_indptr"].append(len(out["row_segments"]))
    out["staged_pages"] = sorted({p for request in requests for p in request.pages.values()} & missing)
    return out


def _complete(requests: Sequence[Request], page_size: int) -> tuple[dict[int, dict[int, int]], dict[int, int]]:
    """Sequence (block -> page) of each row that may share, from its root position on, and that position."""
    sequences: dict[int, dict[int, int]] = {}
    roots: dict[int, int] = {}
    rows = [r for r, q in enumerate(requests) if q.may_share and q.start < q.end]
    for row in sorted(rows, key=lambda r: (requests[r].start, r)):
        start = requests[row].start
        block = start // page_size
        anchors = [
            (requests[i].start, i)
            for i in sequences
            if requests[i].start < start < requests[i].end and requests[i].pages[block] == requests[row].pages[block]
        ]
        top, roots[row] = {}, start
        if anchors:
            _, anchor = min(anchors)
            top = {b: page for b, page in sequences[anchor].items() if b < block}
            roots[row] = roots[anchor]
        sequences[row] = {**top, **requests[row].pages}
    return sequences, roots


def _trie(
    requests: Sequence[Request],
    sequences: dict[int, dict[int, int]],
    roots: dict[int, int],
    rows: Sequence[int],
    page_size: int,
) -> list[_Node]:
    """Groups of two and more rows with a common prefix, parents before children."""
    first: dict[tuple[int, int], list[int]] = defaultdict(list)
    for r in rows:
        first[roots[r], sequences[r][roots[r] // page_size]].append(r)
    nodes: list[_Node] = []
    todo: list[tuple[list[int], int, _Node | None]] = [(g, root, None) for (root, _), g in first.items() if len(g) > 1]
    while todo:
        group, depth, parent = todo.pop()
        shortest = min(requests[r].end for r in group)
        while depth < shortest and len({sequences[r][depth // page_size] for r in group}) == 1:
            depth = min((depth // page_size + 1) * page_size, shortest)
        node = _Node(group, depth, parent)
        nodes.append(node)
        if parent:
            parent.children.append(node)
        next_page = defaultdict(list)
        for r in group:
            if requests[r].end == depth:
                node.single_rows += 1
            else:
                next_page[sequences[r][depth // page_size]].append(r)
        for child in next_page.values():
            if len(child) > 1:
                todo.append((child, depth, node))
            else:
                node.single_rows += 1
    return nodes


def _resident_parts(request: Request, begin: int, end: int, page_size: int, missing: frozenset[int]) -> list[list[int]]:
    """Maximal intervals of the positions whose pages are present."""
    parts: list[list[int]] = []
    for p in range(begin, end):
        if request.pages[p // page_size] in missing:
            continue
        if parts and parts[-1][-1] == p - 1:
            parts[-1].append(p)
        else:
            parts.append([p])
    return parts


def runs_of(slots: Sequence[int]) -> list[list[int]]:
    """Maximal (first, count) runs of consecutive slots."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1][1] += 1
        else:
            runs.append([slot, 1])
    return runs


def as_lists(layout: CsrLayout) -> dict[str, list]:
    return {name: getattr(layout, name).tolist() for name in FIELDS}


def assert_equal(layout: CsrLayout, expected: dict[str, list]) -> None:
    got = as_lists(layout)
    for name in FIELDS:
        assert got[name] == expected[name], f"{name}: got {got[name]}, want {expected[name]}"


def assert_same(a: CsrLayout, b: CsrLayout) -> None:
    """Bitwise the same layout, the way it came about (``appended``) left aside."""
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(x, y), f"{name}: {x.tolist()} against {y.tolist()}"
    assert (a.page_size, a.status) == (b.page_size, b.status)


def check_invariants(
    layout: CsrLayout, requests: Sequence[Request], page_size: int, missing: frozenset[int] = frozenset()
) -> None:
    """What must hold of any layout of these requests, however its segments were chosen."""
    num_rows = len(requests)
    for name in FIELDS:
        array = getattr(layout, name)
        pairs = name in ("segment_rows", "segment_positions", "runs")
        assert array.dtype == torch.int32 and array.is_contiguous() and array.device.type == "cpu", name
        assert array.shape[1:] == ((2,) if pairs else ()), name
    got = as_lists(layout)
    order, num_segments = got["row_order"], len(got["segment_rows"])
    assert (layout.page_size, layout.num_rows, layout.num_segments) == (page_size, num_rows, num_segments)

    assert sorted(order) == list(range(num_rows))
    alone = [r for r, q in enumerate(requests) if not (q.may_share and q.start < q.end)]
    assert order[num_rows - len(alone) :] == alone, "rows that never share come last, by index"

    for name, data in (("page_indptr", "page_indices"), ("run_indptr", "runs"), ("row_indptr", "row_segments")):
        want = num_rows if name == "row_indptr" else num_segments
        assert len(got[name]) == want + 1 and got[name][0] == 0 and got[name][-1] == len(got[data]), name
        assert all(a <= b for a, b in pairwise(got[name])), name

    # Every segment names, for every row that reads it, the slots that the row's table names.
    slots = [q.slots(page_size) for q in requests]
    keys = []
    readers: list[list[int]] = [[] for _ in requests]
    for i, ((first, last), (begin, end)) in enumerate(zip(got["segment_rows"], got["segment_positions"], strict=True)):
        assert 0 <= first < last <= num_rows and 0 <= begin < end
        keys.append((first, begin))
        pages = got["page_indices"][got["page_indptr"][i] : got["page_indptr"][i + 1]]
        assert len(pages) == (end - 1) // page_size - begin // page_size + 1
        of_pages = [pages[p // page_size - begin // page_size] * page_size + p % page_size for p in range(begin, end)]
        assert got["runs"][got["run_indptr"][i] : got["run_indptr"][i + 1]] == runs_of(of_pages)
        for row in order[first:last]:
            request = requests[row]
            assert request.start <= begin and end <= request.end, "a segment outside the row's range"
            assert of_pages == slots[row][begin - request.start : end - request.start], "false share"
            assert last - first == 1 or request.may_share, "an excluded row was grouped"
            readers[row].append(i)
    assert keys == sorted(set(keys)), "segments by (first row, first position)"
    for first, last in got["segment_rows"]:
        for other, end in {tuple(rows) for rows in got["segment_rows"]} if num_rows <= 16 else ():
            assert last <= other or end <= first or (first <= other and end <= last) or (other <= first and last <= end)

    # Every (row, position) once: by a segment, or its page is staged.
    for row, request in enumerate(requests):
        mine = got["row_segments"][got["row_indptr"][row] : got["row_indptr"][row + 1]]
        assert sorted(mine) == readers[row]
        positions = [got["segment_positions"][i] for i in mine]
        assert positions == sorted(positions), f"row {row}: the merge order is that of the positions"
        absent = [p for p in range(request.start, request.end) if request.pages[p // page_size] in missing]
        if not absent:
            at = request.start
            for begin, end in positions:
                assert begin == at, f"row {row}: position {at} is read twice or never"
                at = end
            assert at == request.end
        else:
            read = [p for begin, end in positions for p in range(begin, end)]
            assert read == sorted(read) and sorted(read + absent) == list(range(request.start, request.end))

    wanted = {page for q in requests for page in q.pages.values()}
    assert got["staged_pages"] == sorted(wanted & missing)
    assert layout.is_complete == (not wanted & missing)

    blocks = sum(len(q.pages) for q in requests)
    cuts = sum(page in missing for q in requests for page in q.pages.values())
    assert num_segments <= 4 * num_rows + cuts
    assert len(got["page_indices"]) <= blocks + num_segments
    assert len(got["runs"]) <= len(got["page_indices"])
    assert len(got["row_segments"]) <= num_rows * (num_rows + 1) // 2 + 2 * num_rows + cuts
    lengths = [end - begin for begin, end in got["segment_positions"]]
    assert layout.tokens_stored == sum(lengths) == sum(count for _, count in got["runs"])
    present = sum(
        request.pages[p // page_size] not in missing for request in requests for p in range(request.start, request.end)
    )
    assert layout.tokens_wanted == present
