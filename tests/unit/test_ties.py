"""Which tokens of two engines the serving tests take for the same."""

from __future__ import annotations

import pytest
from serve.ties import same_but_for_ties

BEST = [[(-1.0, 7), (-2.0, 8)], [(-1.5, 5), (-1.5, 6)], [(-1.0, 3), (-3.0, 4)]]


@pytest.mark.parametrize(
    ("tokens", "other", "same"),
    [
        ([7, 5, 3], [7, 5, 3], True),
        ([7, 6, 1], [7, 5, 3], True),  # what follows a tie answers another text
        ([7, 5, 3], [7, 6, 1], True),  # either may have been taken for the best
        ([7, 1, 3], [7, 5, 3], False),
        ([8, 5, 3], [7, 5, 3], False),  # no tie
        ([7, 5, 4], [7, 5, 3], False),
    ],
)
def test_two_texts_may_part_at_a_tie_only(tokens, other, same):
    assert same_but_for_ties(tokens, other, BEST) == same


def test_without_the_best_two_tokens_are_equal():
    assert same_but_for_ties([1, 2], [1, 2], []) and not same_but_for_ties([1, 2], [1, 3], [])
