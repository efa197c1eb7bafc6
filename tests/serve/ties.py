"""Greedy tokens of two engines that add up in other orders: equal, up to where bfloat16 does not tell two apart."""

from __future__ import annotations

from typing import Any

TIE = 0.2
"""Of logits up to 8, which bfloat16 keeps in steps of 0.03, behind layers and all-reduces that round as coarsely."""
ASK = {"return_logprob": True, "top_logprobs_num": 2}
"""What an engine is asked for beside its tokens, for ``best_two``."""


def best_two(answer: dict[str, Any]) -> list[list[tuple[float, int]]]:
    """(logprob, token) of the two best at each place of an answer to ``ASK``."""
    return [[(x[0], x[1]) for x in place] for place in answer["meta_info"]["output_top_logprobs"]]


def same_but_for_ties(tokens: list[int], other: list[int], best: list[list[tuple[float, int]]]) -> bool:
    """Whether ``tokens`` are ``other``'s, or first differ where ``other`` had to choose between two that it held for
    equally good: it may have taken either. ``best``: its ``best_two``; empty: there may be no tie. What follows a tie
    answers another text."""
    if not best:
        return tokens == other
    for mine, theirs, ((first, winner), (second, runner_up)) in zip(tokens, other, best, strict=True):
        if mine != theirs:
            return {mine, theirs} == {winner, runner_up} and first - second < TIE
    return True
