"""How far back the tokens of a layer see. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

Position = TypeVar("Position", bound=Any)  # int or torch.Tensor


@dataclass(frozen=True, order=True)
class Reach:
    """A token at position p sees positions ``begin(p)`` to p, or all of its request's.

    Attributes:
        left:  positions seen before the token's own (a sliding window); -1: all.
        chunk: tokens of a chunk, which a token does not see past the beginning of (chunked local attention); 0: none.
        ahead: tokens see those behind them, too: an encoder.

    Raises ValueError for more than one at once.
    """

    left: int = -1
    chunk: int = 0
    ahead: bool = False

    def __post_init__(self) -> None:
        if (self.left >= 0) + (self.chunk > 0) + self.ahead > 1:
            raise ValueError(f"reach: want a window, chunks or all, got {self}")

    @property
    def everything(self) -> bool:
        """Whether tokens see all that is before them."""
        return self.left < 0 and self.chunk == 0

    def begin(self, position: Position) -> Position:
        """The first position that a token at ``position`` sees; below 0 where it sees all."""
        if self.chunk:
            return position // self.chunk * self.chunk
        return position - self.left if self.left >= 0 else position * 0

    def stop(self, end: int) -> int | None:
        """The first position whose token sees nothing before ``end``; None: all see some of it."""
        if self.chunk:
            return -(-end // self.chunk) * self.chunk
        return end + self.left if self.left >= 0 else None

    def most(self, queries: int) -> int:
        """The most positions that ``queries`` consecutive tokens of one chunk or window read."""
        return self.chunk or self.left + queries

    def rows(self, requests: int, num_tokens: int) -> int:
        """The most windows or chunks that so many requests with so many new tokens have queries in."""
        return requests if not self.chunk else max(1, min(num_tokens, 2 * requests + num_tokens // self.chunk))


EVERYTHING = Reach()
