"""Steps of layers with windows or chunks as SGLang's tables hold them, sane or not, and the tables that are wanted."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import torch

from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.reach import Reach


@dataclass
class Row:
    """What a row of ``DeviceWindow`` reads; one that no request takes reads nothing."""

    request: int = 0
    begin: int = 0
    base: int = 0
    end: int = 0
    queries: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass
class WindowCase:
    """A step, on the CPU."""

    page_size: int
    reach: Reach
    table: torch.Tensor  # [pool, positions] int32 slots
    rows: torch.Tensor  # [B]
    lens: torch.Tensor  # [B]
    q_lens: torch.Tensor | None  # [B]
    num_tokens: int
    max_queries: int
    slot_map: torch.Tensor | None
    num_pages: int
    max_tokens: int
    captured: int  # queries of captured steps: ``max_queries`` of the window
    max_rows: int = 64

    def window(self, device: str = "cpu", max_extend: int = 0) -> DeviceWindow:
        return DeviceWindow(
            self.page_size,
            reach=self.reach,
            max_rows=self.max_rows,
            max_queries=self.captured,
            max_tokens=self.max_tokens,
            num_pages=self.num_pages,
            max_extend=max_extend,
            device=device,
        )

    def snapshot(self, window: DeviceWindow, device: str = "cpu") -> None:
        tensors = (self.table, self.rows, self.lens, self.q_lens, self.slot_map)
        table, rows, lens, q_lens, slot_map = (None if x is None else x.to(device) for x in tensors)
        assert table is not None and rows is not None and lens is not None
        window.snapshot(
            table,
            rows,
            lens,
            q_lens=q_lens,
            num_tokens=self.num_tokens,
            max_queries=self.max_queries,
            slot_map=slot_map,
        )

    def pages(self, request: int, positions: list[int]) -> list[int]:
        """The pages that hold them; 0 where some id is out of its pool."""
        row = max(0, min(int(self.rows[request]), self.table.shape[0] - 1))
        slots = self.table[row, positions].tolist()
        if self.slot_map is not None:
            inside = [0 <= slot < self.slot_map.numel() for slot in slots]
            own = self.slot_map[[slot if x else 0 for slot, x in zip(slots, inside, strict=True)]].tolist()
            slots = [slot if x else -1 for slot, x in zip(own, inside, strict=True)]
        pages = [slot // self.page_size for slot in slots]
        return [page if 0 <= page < self.num_pages else 0 for page in pages]

    def requests(self) -> list[tuple[int, int]]:
        """End and queries of each, as they are cut."""
        result, left = [], self.num_tokens
        for request, length in enumerate(self.lens.tolist()):
            end = max(0, min(length, self.max_tokens, self.table.shape[1]))
            queries = 1 if self.q_lens is None else int(self.q_lens[request])
            queries = max(0, min(queries, end, self.max_queries))
            if self._is_long:
                queries = min(queries, left)
                left -= queries
            result.append((end, queries))
        return result

    def wanted(self) -> list[Row]:
        """Its rows, with the ids of their pages."""
        rows, chunk = [], self.reach.chunk
        for request, (end, queries) in enumerate(self.requests()):
            if not chunk:
                rows.append(self._row(request, max(0, end - queries - self.reach.left), end, queries))
            elif self.q_lens is None:
                rows.append(self._row(request, (end - queries) // chunk * chunk, end, queries))
            elif queries:
                for begin in range((end - queries) // chunk * chunk, end, chunk):
                    stop = min(end, begin + chunk)
                    rows.append(self._row(request, begin, stop, stop - max(begin, end - queries)))
        return rows

    def mask(self) -> torch.Tensor:
        """A random custom mask."""
        size = sum(end * queries for end, queries in self.requests())
        return torch.rand(size + 1, generator=torch.Generator().manual_seed(size)) < 0.5

    def wanted_mask(self) -> torch.Tensor:
        """What the rows read of it."""
        mask, at, of_requests = self.mask(), 0, []
        for end, queries in self.requests():
            of_requests.append(mask[at : at + queries * end].view(queries, end))
            at += queries * end
        parts = [torch.zeros(0, dtype=torch.bool)]
        for x in self.wanted():
            end, queries = self.requests()[x.request]
            first = x.end - x.queries - (end - queries)
            parts.append(of_requests[x.request][first : first + x.queries, x.base : x.end].flatten())
        return torch.cat(parts)

    @property
    def _is_long(self) -> bool:
        """Whether there is no room for so many queries in every row: those of all are then cut to ``num_tokens``."""

        def width(queries: int) -> int:
            pages = -(-(self.reach.most(queries) + self.page_size - 1) // self.page_size)
            return min(pages, -(-self.max_tokens // self.page_size))

        return not self.reach.chunk and width(self.max_queries) > max(width(self.captured), width(self.page_size))

    def _row(self, request: int, begin: int, end: int, queries: int) -> Row:
        base = begin // self.page_size * self.page_size
        firsts = [max(begin, p) for p in range(base, end, self.page_size)] if begin < end else []
        return Row(request, begin, base, end, queries, self.pages(request, firsts) if firsts else [])


def check(case: WindowCase, window: DeviceWindow) -> None:
    """The last snapshot against what is wanted, field by field, and that no two rows overlap."""
    want = case.wanted()
    layout, num_rows = window.layout(window.num_rows), window.num_rows
    assert layout.sizes.tolist() == [num_rows, 0, 0, 0, 0, 0, 0, 0]
    want = (want + [Row()] * num_rows)[:num_rows]
    assert layout.segment_positions[:num_rows].tolist() == [[x.begin - x.base, x.end - x.base] for x in want]
    assert window.lens.tolist() == [x.end - x.base for x in want]
    assert window.q_lens.tolist() == [x.queries for x in want]
    assert window._fields[6:8, :num_rows].tolist() == [[x.base for x in want], [x.request for x in want]]
    entries, table = layout.segment_entries[:num_rows].tolist(), layout.table.tolist()
    assert [table[at : at + len(x.pages)] for at, x in zip(entries, want, strict=True)] == [x.pages for x in want]
    used = sorted((at, at + len(x.pages)) for at, x in zip(entries, want, strict=True) if x.pages)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
    assert all(len(x.pages) <= window.table_stride for x in want)
    assert min(table) >= 0 and max(table) < case.num_pages


def check_mask(case: WindowCase, window: DeviceWindow, device: str = "cpu") -> None:
    """The custom mask, cut to the last snapshot; not for steps of which rows are cut off."""
    want = case.wanted_mask()
    window.take_mask(case.mask().to(device))
    assert torch.equal(window.mask[: want.numel()].cpu(), want)


def random_case(seed: int, *, max_requests: int = 24, max_tokens: int = 400) -> WindowCase:
    """Lengths and queries around the bounds of pages, windows and chunks; tables with ids that name nothing."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    page_size = rng.choice((1, 2, 16, 64))
    left = rng.choice((0, 1, page_size - 1, page_size, rng.randint(0, 2 * max_tokens)))
    chunk = page_size * rng.choice((1, 2, rng.randint(1, 12))) if rng.random() < 0.4 else 0
    reach = Reach(chunk=chunk) if chunk else Reach(left)
    requests, pool, width = rng.randint(1, max_requests), rng.randint(1, 9), rng.randint(1, max_tokens)
    num_pages = rng.randint(1, 200)
    table = torch.randint(0, num_pages * page_size, (pool, width), generator=g, dtype=torch.int32)
    near = (0, 1, left, left + 1, left + 2, page_size, page_size - 1, page_size + 1, chunk, chunk + 1, width)
    lens = [rng.choice((*near, rng.randint(0, width))) for _ in range(requests)]
    rows = [rng.randrange(pool) for _ in range(requests)]
    q_lens = None
    if rng.random() < 0.7:
        q_lens = [min(n, rng.choice((*near, rng.randint(0, n), rng.randint(0, 4)))) for n in map(abs, lens)]
    slot_map = None
    if rng.random() < 0.5:
        slot_map = torch.randint(0, num_pages * page_size, (rng.randint(1, num_pages * page_size),), generator=g)
    cut = rng.random() < 0.3
    case = WindowCase(
        page_size,
        reach,
        table,
        torch.tensor(rows),
        torch.tensor(lens),
        None if q_lens is None else torch.tensor(q_lens),
        requests if q_lens is None else sum(min(q, n, width) for q, n in zip(q_lens, lens, strict=True)),
        1 if q_lens is None else max(1, *q_lens),
        slot_map,
        num_pages,
        max_tokens=rng.randint(1, width) if cut else width,
        captured=rng.choice((1, 1, 2, 8)),
    )
    if rng.random() < 0.3:
        _spoil(case, rng)
    for name in ("rows", "lens", "q_lens", "slot_map"):
        values = getattr(case, name)
        if values is not None and rng.random() < 0.5:
            setattr(case, name, values.int())
    most = reach.rows(requests, case.num_tokens)
    if most > 1024:
        return random_case(seed + 10**6, max_requests=max_requests, max_tokens=max_tokens)
    case.max_rows = max(requests, most) + rng.choice((0, 0, 5))
    return case


def _spoil(case: WindowCase, rng: random.Random) -> None:
    """Puts in what no server should have."""
    for values, wrong in (
        (case.table.view(-1), (-1, -(2**31), 2**31 - 1, 2**30)),
        (case.rows, (-1, 10**6)),
        (case.lens, (-5, 2**31 - 1)),
        (case.q_lens, (-5, 2**31 - 1, 50)),
        (case.slot_map, (-1, 2**31 - 1)),
    ):
        if values is not None:
            for _ in range(rng.randint(0, 3)):
                values[rng.randrange(values.numel())] = rng.choice(wrong)
