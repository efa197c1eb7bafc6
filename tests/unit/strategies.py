"""Batches for the property tests: what a radix cache makes, and what no radix cache would ever make."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from unit.oracle import Request

from flashcore_sglang.config import SHARE_ALWAYS, CostModel

PAGE_SIZES = (1, 3, 16, 32, 64, 128)
TYPICAL = CostModel(token_cost=1, segment_cost=128, partial_cost=64)

settings.register_profile("flashcore", deadline=None, max_examples=100, derandomize=True, print_blob=True)
settings.load_profile("flashcore")


@dataclass(frozen=True)
class Batch:
    """Rows of pages and the ranges of them that are read. ``pages[row][block]`` exists for every block of the table."""

    page_size: int
    num_pages: int
    pages: list[list[int]]
    starts: list[int]
    ends: list[int]

    @property
    def num_rows(self) -> int:
        return len(self.pages)

    @property
    def num_blocks(self) -> int:
        return len(self.pages[0]) if self.pages else 1

    def vectors(self, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.starts, dtype=dtype), torch.tensor(self.ends, dtype=dtype)

    def page_ids(self) -> torch.Tensor:
        """[B, blocks] int32."""
        return torch.tensor(self.pages, dtype=torch.int32).view(self.num_rows, self.num_blocks)

    def token_to_page(self, garbage: int | None = None) -> torch.Tensor:
        """[B, T] int32, the page of each position; `garbage` at every position outside the ranges."""
        table = self.page_ids().repeat_interleave(self.page_size, 1)
        return table if garbage is None else self._outside(table, garbage)

    def slots(self, garbage: int | None = None) -> torch.Tensor:
        """[B, T] int32, the slot of each position, as SGLang keeps them."""
        offsets = torch.arange(self.page_size, dtype=torch.int32).repeat(self.num_blocks)
        table = self.token_to_page() * self.page_size + offsets
        return table if garbage is None else self._outside(table, garbage)

    def _outside(self, table: torch.Tensor, garbage: int) -> torch.Tensor:
        position = torch.arange(table.shape[1])
        starts, ends = self.vectors()
        inside = (position >= starts[:, None]) & (position < ends[:, None])
        return torch.where(inside, table, torch.tensor(garbage, dtype=torch.int32))

    def requests(self) -> list[Request]:
        size = self.page_size
        return [
            Request(start, end, {p // size: pages[p // size] for p in range(start, end)})
            for pages, start, end in zip(self.pages, self.starts, self.ends, strict=True)
        ]

    def permuted(self, order: list[int]) -> Batch:
        def pick(values: list) -> list:
            return [values[i] for i in order]

        return replace(self, pages=pick(self.pages), starts=pick(self.starts), ends=pick(self.ends))


def lengths(page_size: int, num_blocks: int) -> st.SearchStrategy[int]:
    """Any length, with those around page boundaries made likely."""
    last = page_size * num_blocks
    near = st.builds(lambda b, d: min(last, max(0, b * page_size + d)), st.integers(0, num_blocks), st.integers(-1, 1))
    return st.integers(0, last) | near


def page_numbers(rows: int, blocks: int, kind: str, seed: int) -> list[list[int]]:
    """A page of its own for every (row, block); page 0 is left free."""
    if kind == "consecutive":
        return [[1 + r * blocks + b for b in range(blocks)] for r in range(rows)]
    if kind == "interleaved":  # what decode steps leave behind
        return [[1 + b * rows + r for b in range(blocks)] for r in range(rows)]
    ids = list(range(1, 1 + rows * blocks))
    random.Random(seed).shuffle(ids)
    return [ids[r * blocks : (r + 1) * blocks] for r in range(rows)]


@st.composite
def forests(
    draw: st.DrawFn,
    *,
    min_rows: int = 0,
    max_rows: int = 8,
    max_blocks: int = 5,
    page_sizes: tuple[int, ...] = PAGE_SIZES,
    with_starts: bool = False,
) -> Batch:
    """Rows that continue prefixes of earlier rows (any number of groups and levels) on pages of their own."""
    size = draw(st.sampled_from(page_sizes))
    rows, blocks = draw(st.integers(min_rows, max_rows)), draw(st.integers(1, max_blocks))
    kind = draw(st.sampled_from(("consecutive", "interleaved", "shuffled")))
    pages = page_numbers(rows, blocks, kind, draw(st.integers(0, 2**16)))
    for row in range(1, rows):
        parent = draw(st.none() | st.integers(0, row - 1))
        if parent is not None:
            shared = draw(st.integers(0, blocks))
            pages[row][:shared] = pages[parent][:shared]
    ends = [draw(lengths(size, blocks)) for _ in range(rows)]
    starts = [draw(lengths(size, blocks).map(lambda s, e=end: min(s, e))) if with_starts else 0 for end in ends]
    return Batch(size, rows * blocks + 1, pages, starts, ends)


@st.composite
def nonsense(draw: st.DrawFn, *, max_rows: int = 6, max_blocks: int = 5, with_starts: bool = True) -> Batch:
    """Ids out of a tiny alphabet: pages at several depths, twice in a row, equal tails behind different heads."""
    size = draw(st.sampled_from((1, 2, 3, 16)))
    rows, blocks = draw(st.integers(0, max_rows)), draw(st.integers(1, max_blocks))
    alphabet = draw(st.integers(1, 3))
    pages = [[draw(st.integers(0, alphabet - 1)) for _ in range(blocks)] for _ in range(rows)]
    ends = [draw(lengths(size, blocks)) for _ in range(rows)]
    starts = [draw(lengths(size, blocks).map(lambda s, e=end: min(s, e))) if with_starts else 0 for end in ends]
    return Batch(size, alphabet, pages, starts, ends)


def batches() -> st.SearchStrategy[Batch]:
    return forests() | forests(with_starts=True) | nonsense()


def cost_models() -> st.SearchStrategy[CostModel]:
    small = st.builds(CostModel, st.integers(0, 3), st.integers(0, 40), st.integers(0, 20))
    return st.sampled_from((SHARE_ALWAYS, TYPICAL)) | small
