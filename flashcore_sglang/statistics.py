"""What the log says of a running server: how much was shared, and what was wrong with its tables."""

from __future__ import annotations

import logging
import time

import torch

from flashcore_sglang.layout import CsrLayout

VIOLATION_SECONDS = 10.0
"""The least time between two reports of a violated bound."""


class DecodeStatistics:
    """Counts decode steps on the CPU and logs a line every ``interval`` of them; 0 is never."""

    def __init__(self, logger: logging.Logger, interval: int) -> None:
        self._logger, self._interval = logger, interval
        self._reset()

    def _reset(self) -> None:
        self._steps = self._appended = self._tokens_wanted = self._tokens_read = 0
        self._pager_seconds, self._since = 0.0, time.monotonic()

    def count(self, layout: CsrLayout, pager_seconds: float) -> None:
        """One decode step. ``pager_seconds``: host time of the snapshot, the pager and the plan."""
        if not self._interval:
            return
        self._steps += 1
        self._appended += layout.appended
        self._tokens_wanted += layout.tokens_wanted
        self._tokens_read += layout.tokens_stored
        self._pager_seconds += pager_seconds
        if self._steps < self._interval:
            return
        self._logger.info(
            "flashcore_sparse: %d decode steps in %.1f s by PyTorch, last of %d requests in %d segments; KV tokens "
            "read %d of %d (%.2fx shared); pager %.2f ms per step, %d appended",
            self._steps,
            time.monotonic() - self._since,
            layout.num_rows,
            layout.num_segments,
            self._tokens_read,
            self._tokens_wanted,
            self._tokens_wanted / max(1, self._tokens_read),
            1e3 * self._pager_seconds / self._steps,
            self._appended,
        )
        self._reset()


class GpuStatistics:
    """Logs the layout of every ``interval``-th decode step on a GPU, a step late and without waiting for it."""

    def __init__(self, logger: logging.Logger, interval: int, sizes: torch.Tensor, page_size: int) -> None:
        self._logger, self._interval, self._page_size = logger, interval, page_size
        self._sizes = sizes
        self._wanted = torch.zeros(1, dtype=torch.int64, device=sizes.device)
        self._host_sizes = torch.zeros(8, dtype=torch.int32, pin_memory=True)
        self._host_wanted = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()
        self._steps = self._rows = 0

    def before_step(self, seq_lens: torch.Tensor) -> None:
        """Called before the snapshot of each step: the layout in memory is that of the step before."""
        if not self._interval:
            return
        self._steps += 1
        phase = self._steps % self._interval
        if phase == self._interval - 1:
            self._rows = seq_lens.numel()
            torch.sum(seq_lens, dim=0, keepdim=True, out=self._wanted)
        elif phase == 0 and self._rows:
            self._host_sizes.copy_(self._sizes, non_blocking=True)
            self._host_wanted.copy_(self._wanted, non_blocking=True)
            self._copied.record()
        elif phase == min(4, self._interval - 2) and self._rows and self._copied.query():
            segments, pages = self._host_sizes[:2].tolist()
            wanted, read = int(self._host_wanted), pages * self._page_size
            self._logger.info(
                "flashcore_sparse: decode step %d by WGMMA, %d requests in %d segments; KV tokens read %d of %d "
                "(%.2fx shared)",
                self._steps - phase,
                self._rows,
                segments,
                read,
                wanted,
                wanted / max(1, read),
            )


class ViolationLog:
    """Reports violated bounds, at most one every ``VIOLATION_SECONDS``, with the number of those in between."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._count = 0
        self._last = -VIOLATION_SECONDS

    def report(self, what: str) -> None:
        self._count += 1
        now = time.monotonic()
        if now - self._last < VIOLATION_SECONDS:
            return
        self._logger.error(
            "flashcore_sparse: %s; read as padding: the answer of that request is wrong, the others are not affected "
            "(%d such steps so far). Please report this.",
            what,
            self._count,
        )
        self._last = now
