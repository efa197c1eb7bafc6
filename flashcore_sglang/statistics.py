"""What the log says of a running server: how much was shared, why nothing is, and what was wrong with its tables."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashcore_sglang.config import CostModel
from flashcore_sglang.device_pager import DevicePager
from flashcore_sglang.gpu_decode import GpuDecode
from flashcore_sglang.layout import CsrLayout

VIOLATION_SECONDS = 10.0
"""The least time between two reports of a violated bound."""
UNSHARED_SAMPLES = 3
"""Samples in a row with nothing shared after which the log says so, once."""


@dataclass(frozen=True)
class Sample:
    """One decode step out of ``steps``.

    Attributes:
        path:          what computed it: "WGMMA" or "PyTorch".
        steps:         decode steps since the sample before, this one included.
        requests:      of the batch, padded rows included.
        segments:      of its layout.
        tokens_wanted: KV tokens that attention reads where every request reads its own; whole pages on a GPU.
        tokens_read:   KV tokens that attention read, in the same unit.
        pager_us:      snapshot, pager and work list: device time on a GPU, host time on a CPU.
    """

    path: str
    steps: int
    requests: int
    segments: int
    tokens_wanted: int
    tokens_read: int
    pager_us: float

    @property
    def sharing_ratio(self) -> float:
        return self.tokens_wanted / max(1, self.tokens_read)


Consumer = Callable[[Sample], None]


class CpuSampler:
    """Every ``interval``-th decode step on a CPU; 0 is none."""

    def __init__(self, interval: int, consumers: list[Consumer]) -> None:
        self._interval, self._consumers, self._steps = interval, consumers, 0

    def count(self, layout: CsrLayout, pager_seconds: float) -> bool:
        """One decode step, whose pager and plan took ``pager_seconds``; returns whether it is sampled."""
        self._steps += 1
        if not self._interval or self._steps % self._interval:
            return False
        sample = Sample(
            "PyTorch",
            self._interval,
            layout.num_rows,
            layout.num_segments,
            layout.tokens_wanted,
            layout.tokens_stored,
            1e6 * pager_seconds,
        )
        for consume in self._consumers:
            consume(sample)
        return True


class GpuSampler:
    """Every ``interval``-th decode step on a GPU, or a later one while a sample is on its way; 0 is none.

    A sampled step plans twice: once here, between two events, and once in its graph, with the same result. The layout's
    sizes are copied to pinned memory and read in a later step, when the copy is found finished: the host never waits.
    """

    def __init__(self, interval: int, consumers: list[Consumer], decode: GpuDecode) -> None:
        assert isinstance(decode.pager, DevicePager), "a window shares nothing"
        self._interval, self._consumers, self._decode, self._pager = interval, consumers, decode, decode.pager
        self._steps = self._sampled = 0
        self._pending: tuple[int, int] | None = None  # steps, requests
        if interval:
            self._start, self._planned, self._copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            self._sizes = torch.zeros(2, dtype=torch.int32, pin_memory=True)
            self._pages_wanted = torch.zeros(1, dtype=torch.int64, pin_memory=True)

    def before_snapshot(self) -> bool:
        """Starts a step. Returns whether to sample it: then ``after_snapshot`` follows."""
        if not self._interval:
            return False
        self._steps += 1
        if self._pending and self._copied.query():
            self._publish(*self._pending)
            self._pending = None
        due = self._steps - self._sampled >= self._interval and not self._pending
        if due:
            self._start.record()
        return due

    def after_snapshot(self, requests: int) -> None:
        decode = self._decode
        decode.plan()
        self._planned.record()
        self._sizes.copy_(self._pager.sizes[:2], non_blocking=True)
        self._pages_wanted.copy_(self._pager.pages_wanted(requests), non_blocking=True)
        self._copied.record()
        self._pending = (self._steps - self._sampled, requests)
        self._sampled = self._steps

    def _publish(self, steps: int, requests: int) -> None:
        segments, pages_read = self._sizes.tolist()
        page_size = self._decode.page_size
        sample = Sample(
            "WGMMA",
            steps,
            requests,
            segments,
            int(self._pages_wanted) * page_size,
            pages_read * page_size,
            1e3 * self._start.elapsed_time(self._planned),
        )
        for consume in self._consumers:
            consume(sample)


class SampleLog:
    """A line in the log for each sample, and once the reason why nothing is shared.

    Args:
        cost: the pager's; says how long a prefix must be.
        reason: why this server cannot share, or None: then it depends on the requests.
    """

    def __init__(self, logger: logging.Logger, cost: CostModel, reason: str | None) -> None:
        self._logger, self._cost, self._reason = logger, cost, reason
        self._since = time.monotonic()
        self._unshared = 0

    def __call__(self, sample: Sample) -> None:
        now = time.monotonic()
        self._logger.info(
            "flashcore_sparse: %d decode steps in %.1f s by %s; the last: %d requests in %d segments, KV tokens read "
            "%d of %d (%.2fx shared), pager %.0f us",
            sample.steps,
            now - self._since,
            sample.path,
            sample.requests,
            sample.segments,
            sample.tokens_read,
            sample.tokens_wanted,
            sample.sharing_ratio,
            sample.pager_us,
        )
        self._since = now
        if sample.requests > 1 and self._unshared < UNSHARED_SAMPLES and not self._reason:
            self._unshared = 0 if sample.sharing_ratio > 1 else self._unshared + 1
            if self._unshared == UNSHARED_SAMPLES:
                self._logger.info(
                    "flashcore_sparse: nothing is shared by these requests: no two of them have the same KV pages for "
                    "their first %d tokens, which is the least that pays",
                    least_prefix(self._cost, 2),
                )


def least_prefix(cost: CostModel, rows: int) -> int:
    """Tokens that ``rows`` requests must have in common for the pager to share them."""
    saved = max(1, (rows - 1) * cost.token_cost)
    return max(1, -(-(cost.segment_cost + rows * cost.partial_cost) // saved))


def no_sharing_reason(*, sharing: bool, deterministic: bool, radix_cache: bool, pd_decode: bool = False) -> str | None:
    """Why this server never shares, with the remedy; None if it does. ``pd_decode``: it decodes what others prefill."""
    if not sharing:
        return "FLASHCORE_SHARING=0; unset it"
    if deterministic:
        return "--enable-deterministic-inference asks for sums whose order does not depend on the batch; leave it out"
    if pd_decode and not radix_cache:
        return "a PD decode server keeps no radix cache; add --disaggregation-decode-enable-radix-cache"
    if not radix_cache:
        return "--disable-radix-cache gives every request its own pages; leave it out"
    return None


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
