"""The rows of bench_serve.py, and the tables and the chart of what it measured."""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One workload, and what it must show: ours over FA3. ``cold``: nothing is cached, and the whole run counts."""

    groups: int
    requests: int  # of each group
    shared: int
    own: int
    output: int
    target: float | None = None
    cold: bool = False

    @property
    def name(self) -> str:
        return f"{self.groups}x{self.requests}:{self.shared}+{self.own}:{self.output}{':cold' if self.cold else ''}"

    @property
    def batch(self) -> int:
        return self.groups * self.requests

    def prefixes(self) -> list[list[int]]:
        return [_tokens(f"prefix {g} {self.shared}", self.shared) for g in range(self.groups)]

    def prompts(self) -> list[list[int]]:
        """Group after group."""
        return [
            prefix + _tokens(f"own {g} {i} {self.name}", self.own)
            for g, prefix in enumerate(self.prefixes())
            for i in range(self.requests)
        ]


ROWS = (
    Row(1, 256, 8192, 128, 128, 3.5),
    Row(1, 256, 8192, 128, 512, 3.0),
    Row(1, 512, 2048, 128, 128, 1.65),
    Row(8, 32, 4096, 256, 128, 2.2),
    Row(1, 32, 32768, 512, 128, 2.7),
    Row(64, 1, 2048, 128, 128, 0.99),
    Row(1, 1, 1024, 128, 128, 0.99),
    Row(64, 1, 8192, 0, 16, 0.99, cold=True),
)


def _tokens(seed: str, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(10, 10_000) for _ in range(count)]


def parse_row(text: str) -> Row:
    """A row of the table by its name, or a new one.

    Raises argparse.ArgumentTypeError for text of another form.
    """
    for row in ROWS:
        if row.name == text:
            return row
    found = re.fullmatch(r"(\d+)x(\d+):(\d+)\+(\d+):(\d+)(:cold)?", text)
    if not found:
        wanted = "groups x requests : shared + own : output, as 8x32:4096+256:128"
        raise argparse.ArgumentTypeError(f"row: want {wanted}, got {text!r}")
    groups, requests, shared, own, output = (int(found[i]) for i in range(1, 6))
    return Row(groups, requests, shared, own, output, cold=bool(found[6]))


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def figure(results: dict[str, Any], backend: str, row: Row) -> float | None:
    """Output tokens per second that count for the row: steady, or whole if it is cold."""
    entry = results["backends"].get(backend, {}).get("rows", {}).get(row.name)
    return entry and (entry["whole"] if row.cold else entry["steady"])


def ratio(results: dict[str, Any], row: Row, ours: str, peer: str) -> float | None:
    mine, other = figure(results, ours, row), figure(results, peer, row)
    return mine / other if mine and other else None


def _measured_rows(results: dict[str, Any]) -> list[Row]:
    names = [name for entry in results["backends"].values() for name in entry["rows"]]
    return [parse_row(name) for name in dict.fromkeys(names)]


def table(results: dict[str, Any]) -> str:
    """Markdown: steady tokens per second of each backend, whole-run time, ours over the peers, and the target."""
    backends = list(results["backends"])
    lines = [
        "| groups x requests: shared + own: output | " + " | ".join(backends) + " | x fa3 | wanted | x flashinfer |",
        "|---" * (len(backends) + 4) + "|",
    ]
    ours = next((b for b in backends if b.startswith("ours")), "ours")
    for row in _measured_rows(results):
        cells = []
        for backend in backends:
            entry = results["backends"][backend]["rows"].get(row.name)
            cells.append(f"{cell(figure(results, backend, row))} ({entry['seconds']:.1f} s)" if entry else "-")
        ratios = [ratio(results, row, ours, peer) for peer in ("fa3", "flashinfer")]
        words = [f"{r:.2f}" if r else "-" for r in ratios]
        lines.append(f"| {row.name} | " + " | ".join(cells) + f" | {words[0]} | {row.target or ''} | {words[1]} |")
    return "\n".join(lines)


def load_table(results: dict[str, Any]) -> str:
    """Markdown: time to first token and between tokens, p50 / p99 in milliseconds; empty without ``--load``."""
    lines = []
    for row in _measured_rows(results):
        for backend, entry in results["backends"].items():
            if measured := entry["rows"].get(row.name, {}).get("load"):
                cells = [f"{measured[k]['p50_ms']:.1f} / {measured[k]['p99_ms']:.1f}" for k in ("ttft", "itl")]
                rate = f"{measured['tokens_per_second']:,.0f}"
                lines.append(f"| {row.name} | {rate} | {backend} | " + " | ".join(cells) + " |")
    heads = ["| row | tokens/s asked for | backend | TTFT p50 / p99, ms | ITL p50 / p99, ms |", "|---|---|---|---|---|"]
    return "\n".join([*heads, *lines]) if lines else ""


def split_table(results: dict[str, Any]) -> str:
    """Markdown: milliseconds of a decode step by what ran, of rows that have a rate; empty without ``--split-rows``."""
    lines, kinds = [], []
    for row in _measured_rows(results):
        for backend, entry in results["backends"].items():
            measured = entry["rows"].get(row.name, {})
            shares = measured.get("split")
            if shares and measured["steady"]:
                kinds, step = list(shares), 1e3 * row.batch / measured["steady"]
                times = [f"{step * share:.2f}" for share in (1.0, *shares.values())]
                lines.append(f"| {row.name} | {backend} | " + " | ".join(times) + " |")
    heads = ["| row | backend | ms of a step | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 3) + "|"]
    return "\n".join([*heads, *lines]) if lines else ""


def client_table(results: dict[str, Any]) -> str:
    """Markdown: what SGLang's own client measured, whole runs; empty without ``--sglang-benchmark``."""
    lines = []
    for row in _measured_rows(results):
        for backend, entry in results["backends"].items():
            if figures := entry["rows"].get(row.name, {}).get("sglang_benchmark"):
                cells = [f"{figures[f'median_{k}_ms']:.1f} / {figures[f'p99_{k}_ms']:.1f}" for k in ("ttft", "itl")]
                rate = f"{figures['output_throughput']:,.0f}"
                lines.append(f"| {row.name} | {figures['dataset']} | {backend} | {rate} | " + " | ".join(cells) + " |")
    heads = ["| row | dataset | backend | tokens/s, whole run | TTFT p50 / p99, ms | ITL p50 / p99, ms |"]
    return "\n".join([*heads, "|---|---|---|---|---|---|", *lines]) if lines else ""


def chart(results: dict[str, Any], path: Path) -> None:
    """Throughput relative to FA3, one group of bars per row. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in _measured_rows(results) if figure(results, "fa3", row)]
    backends = [b for b in results["backends"] if any(figure(results, b, row) for row in rows)]
    picture, axes = pyplot.subplots(figsize=(1.5 + 1.5 * len(rows), 4.2), layout="constrained")
    width = 0.8 / max(1, len(backends))
    for i, backend in enumerate(backends):
        heights = [ratio(results, row, backend, "fa3") or 0.0 for row in rows]
        bars = axes.bar([x + i * width for x in range(len(rows))], heights, width, label=backend)
        axes.bar_label(bars, [f"{h:.2f}" if h else "" for h in heights], fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    labels = [row.name.replace(":", "\n", 1) for row in rows]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], labels, fontsize=8)
    axes.set_ylabel("output tokens per second, FA3 = 1")
    axes.set_title(f"Steady decode, Llama-3.1-8B shape, bf16, {results['machine']['gpu'] or 'no GPU'}")
    axes.margins(y=0.2)
    axes.legend(ncols=len(backends))
    picture.savefig(path, dpi=120)
