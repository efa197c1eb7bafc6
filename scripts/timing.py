"""Times of CUDA graphs with the L2 in a stated condition, and what a result file says of the machine."""

from __future__ import annotations

import pathlib
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"


class Flusher:
    """Fills the L2 with other lines by reading 256 MiB. Writing would leave 50 MB of dirty lines, whose way back to
    memory would be billed to the kernel that is timed next: 17 us, more than a short one takes."""

    def __init__(self) -> None:
        self.junk = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
        self.sum = torch.zeros((), dtype=torch.int64, device="cuda")

    def __call__(self) -> None:
        torch.sum(self.junk, dim=0, out=self.sum)


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """One call of `function`, warmed up, as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def microseconds(
    graphs: torch.cuda.CUDAGraph | list[torch.cuda.CUDAGraph], flush: Callable[[], None] | None, replays: int
) -> float:
    """Median time of a replay; `flush` runs before each, untimed. Several graphs take turns. Synchronises."""
    turns = [graphs] if isinstance(graphs, torch.cuda.CUDAGraph) else graphs
    events = []
    for i in range(replays):
        if flush is not None:
            flush()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        turns[i % len(turns)].replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3


def empty_graph_us(flush: Callable[[], None], kernels: int) -> float:
    """Microseconds of a graph of `kernels` kernels that do nothing to speak of."""
    word = torch.zeros(1, device="cuda")

    def run() -> None:
        for i in range(kernels):
            word.fill_(float(i))

    graph = captured(run)
    return min(microseconds(graph, flush, 20) for _ in range(3))


def copy_gbps() -> float:
    """GB/s of a copy on the GPU, bytes read plus bytes written: the better of cudaMemcpyAsync and a kernel of torch's,
    2 GiB of random data each way."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    copies: tuple[Callable[[], Any], ...] = (lambda: b.copy_(a), lambda: torch.mul(a, 1.0, out=b))
    us = min(microseconds(captured(copy), None, 10) for copy in copies)
    return 2 * a.numel() * a.element_size() / us / 1e3


def machine() -> dict[str, str]:
    """GPU, driver, versions and git revision."""

    def said(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "revision": said("git", "rev-parse", "HEAD"),
    }
