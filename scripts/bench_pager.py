"""Time of the device pager, GPU side, inside CUDA graphs: what one decode step pays once for all layers.

    python scripts/bench_pager.py [--json FILE]

Each case is timed as a rebuild in which every row has changed (two tables in turn), as a rebuild after one request has
taken the place of another, and as an append (nothing old has changed). `cold`: one step per graph, L2 flushed before
it, less the time of a graph of two empty kernels. `warm`: 20 steps in one graph, per step.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

import torch
from timing import ROOT, Flusher, captured, empty_graph_us, machine, microseconds

sys.path[:0] = [str(ROOT)]

from flashcore_sglang.device_pager import DevicePager  # noqa: E402

STEPS = 20


def make_table(rows: int, tokens: int, page_size: int, shared: list[tuple[int, int]], seed: int) -> torch.Tensor:
    """[rows + 1, tokens + 8] slots; `shared`: (rows of a group, tokens they have in common), outermost first."""
    pages = -(-(tokens + 8) // page_size)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    ids = torch.randperm((rows + 1) * pages, generator=generator, device="cuda").view(rows + 1, pages)
    for group, length in reversed(shared):
        leaders = (torch.arange(rows, device="cuda") // group) * group + 1
        ids[1:, : length // page_size] = ids[leaders, : length // page_size]
    slots = ids[:, :, None] * page_size + torch.arange(page_size, device="cuda")
    return slots.flatten(1)[:, : tokens + 8].to(torch.int32).contiguous()


def measure(
    rows: int,
    tokens: int,
    page_size: int,
    shared: list[tuple[int, int]],
    canonical: bool,
    flush: Flusher,
    empty: float,
) -> dict[str, float]:
    tables = [make_table(rows, tokens, page_size, shared, seed) for seed in range(2)]
    replaced = tables[0].clone()
    replaced[rows // 2] = tables[1][rows // 2]
    indices = torch.arange(1, rows + 1, device="cuda")
    lens = torch.full((rows,), tokens, device="cuda")
    pager = DevicePager(
        page_size, max_rows=rows, max_tokens=tokens + 8, num_pages=2**31 // page_size - 1, canonical=canonical
    )

    def step(table: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            pager.snapshot(table, indices, lens)
            pager.build()

        return run

    def alternate() -> None:
        for i in range(STEPS):
            step(tables[i % 2])()

    def repeat() -> None:
        for _ in range(STEPS):
            step(tables[1])()

    single = [captured(step(t)) for t in tables]
    result = {"empty_graph": empty}
    result["rebuild_cold"] = microseconds(single, flush, 40) - empty
    assert not pager.layout(rows).sizes[5], "the tables in turn must rebuild"
    result["replace_cold"] = microseconds([captured(step(t)) for t in (tables[0], replaced)], flush, 40) - empty
    single[1].replay()
    result["append_cold"] = microseconds(single[1:], flush, 40) - empty
    assert pager.layout(rows).sizes[5], "the same table must append"
    result["rebuild_warm"] = microseconds([captured(alternate)], None, 12) / STEPS
    result["append_warm"] = microseconds([captured(repeat)], None, 12) / STEPS
    result["segments"] = int(pager.layout(rows).sizes[0])
    result["mebibytes"] = pager.mebibytes
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    path = parser.parse_args().json
    records, facts = [], machine()
    print(f"{facts['gpu']}, torch {facts['torch']}, revision {facts['revision'][:12]}; microseconds per step")
    flush = Flusher()
    empty = empty_graph_us(flush, 2)
    columns = ("rebuild_cold", "replace_cold", "append_cold", "rebuild_warm", "append_warm")
    print(f"{'case':<44}" + "".join(f"{c:>14}" for c in columns) + f"{'segments':>10}{'MiB':>8}")
    forests = {
        "nothing shared": (256, 8192, []),
        "8192 shared by all": (256, 8448, [(256, 8192)]),
        "2 levels, 16 groups": (256, 8192, [(256, 4096), (16, 7168)]),
        "5 levels": (256, 8192, [(256, 2048), (64, 4096), (16, 6144), (4, 7168), (2, 7680)]),
        "1024, nothing shared": (1024, 8192, []),
        "1024, 8192 shared by all": (1024, 8448, [(1024, 8192)]),
        "1024, 3 levels": (1024, 8192, [(1024, 4096), (64, 6144), (8, 7168)]),
        "16 x 131072, 90112 shared": (16, 131072, [(16, 90112)]),
    }
    for page_size in (1, 64):
        for name, (rows, tokens, shared) in forests.items():
            for canonical in (False, True) if rows == 256 and len(shared) < 2 else (False,):
                result = measure(rows, tokens, page_size, shared, canonical, flush, empty)
                label = f"page {page_size}, {name}{', canonical' if canonical else ''}"
                print(f"{label:<44}" + "".join(f"{result[c]:>14.1f}" for c in columns)
                      + f"{result['segments']:>10}{result['mebibytes']:>8.1f}", flush=True)  # fmt: skip
                records.append({"case": label, "rows": rows, "tokens": tokens, "page_size": page_size, **result})
    if path:
        path.write_text(json.dumps(facts | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
