"""Batches of serving size: 1,024 requests, 128K tokens, forests as deep and as wide as they get."""

from __future__ import annotations

import random

import torch
from unit import oracle
from unit.oracle import Request
from unit.strategies import TYPICAL

from flashcore_sglang.config import SHARE_ALWAYS, CostModel
from flashcore_sglang.layout import CsrLayout, build_layout


def check(pages: list[list[int]], ends: list[int], page_size: int, num_pages: int, cost: CostModel) -> CsrLayout:
    """Layout of rows of pages that begin at 0; verified against the oracle."""
    table = torch.zeros(len(pages), max(map(len, pages)), dtype=torch.int32)
    for row, ids in enumerate(pages):
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    layout = build_layout(
        table.unsqueeze(-1).expand(-1, -1, page_size),
        torch.zeros(len(pages), dtype=torch.int32),
        torch.tensor(ends),
        page_tokens=page_size,
        num_pages=num_pages,
        cost_model=cost,
    )
    requests = [
        Request(0, end, dict(enumerate(ids[: -(-end // page_size)]))) for ids, end in zip(pages, ends, strict=True)
    ]
    oracle.check_invariants(layout, requests, page_size)
    oracle.assert_equal(layout, oracle.expected_layout(requests, page_size, cost))
    return layout


def test_layout_of_1024_requests_in_uneven_groups_equals_oracle() -> None:
    """Groups of 1, 2, 4, ... rows with prefixes of several levels, shuffled rows and shuffled pages."""
    rng = random.Random(1)
    ids = list(range(1, 60_000))
    rng.shuffle(ids)
    fresh = iter(ids)
    system = [next(fresh) for _ in range(24)]
    pages = []
    while len(pages) < 1024:
        group = [next(fresh) for _ in range(rng.randrange(12))]
        for _ in range(min(2 ** rng.randrange(8), 1024 - len(pages))):
            own = [next(fresh) for _ in range(rng.randrange(1, 5))]
            pages.append((system if rng.random() < 0.7 else []) + group + own)
    rng.shuffle(pages)
    ends = [len(p) * 16 - rng.randrange(16) for p in pages]
    layout = check(pages, ends, 16, 60_000, TYPICAL)
    assert layout.tokens_stored < layout.tokens_wanted / 3


def test_layout_of_128k_tokens_at_page_size_1_equals_oracle() -> None:
    """A long document, shared, with tails of which one was generated between the others' tokens."""
    document = list(range(10, 10 + 131_072 - 64))
    tails = [[140_000 + 3 * i + row for i in range(64)] for row in range(3)]
    layout = check([document + tail for tail in tails], [131_072] * 3, 1, 150_000, TYPICAL)
    assert layout.segment_positions.tolist() == [[0, 131_008], *([[131_008, 131_072]] * 3)]
    assert layout.tokens_stored == 131_008 + 3 * 64


def test_layout_of_a_chain_of_256_prefixes_equals_oracle() -> None:
    """The deepest forest: every row is a prefix of the next, so that a row has up to 256 segments."""
    order = list(range(256))
    random.Random(2).shuffle(order)
    chain = list(range(1, 257))
    layout = check([chain[: n + 1] for n in order], [n + 1 for n in order], 1, 300, SHARE_ALWAYS)
    assert layout.num_segments == 256
    assert layout.tokens_stored == 256


def test_layout_of_a_binary_tree_of_1024_rows_reaches_the_segment_bound() -> None:
    """The widest: 2B - 1 segments, one for every node."""
    pages = [[(1 << level) + (row >> (10 - level)) for level in range(11)] for row in range(1024)]
    layout = check(pages, [11] * 1024, 1, 2048, SHARE_ALWAYS)
    assert layout.num_segments == 2 * 1024 - 1


def test_layout_of_1024_unrelated_rows_shares_nothing() -> None:
    layout = check([[r + 1] for r in range(1024)], [1] * 1024, 1, 1025, SHARE_ALWAYS)
    assert layout.tokens_stored == layout.tokens_wanted == 1024
