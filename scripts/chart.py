"""Draw the results of bench_decode.py: how much faster ours is than the peers, and what the floors would allow.

python scripts/chart.py                                    # every scripts/results/decode_*.json -> decode.png
python scripts/chart.py scripts/results/decode_runs_p1.json --out decode_p1.png
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from timing import RESULTS


def speedups(case: dict[str, Any]) -> tuple[float, float]:
    """(FA3, the better of FlashInfer's two) over ours; 0 where it was not measured."""
    return case["ratio"] or 0.0, case["flashinfer_ratio"] or 0.0


def limit(case: dict[str, Any]) -> float:
    """FA3 over the larger floor: what no kernel can exceed."""
    return case["ratio"] * 100 / case["percent_of_floor"] if case["ratio"] else 0.0


def draw(axis: plt.Axes, record: dict[str, Any]) -> None:
    cases = [c for c in record["cases"] if c["ratio"] or c["flashinfer_ratio"]]
    places = range(len(cases))
    fa3, flashinfer = zip(*map(speedups, cases), strict=True)
    axis.barh([y - 0.2 for y in places], fa3, 0.4, color="#1f77b4", label="FA3 / ours")
    axis.barh([y + 0.2 for y in places], flashinfer, 0.4, color="#ff9e4a", label="FlashInfer (better one) / ours")
    for y, case, ratio in zip(places, cases, fa3, strict=True):
        axis.text(ratio, y - 0.2, f" {ratio:.2f}", va="center", fontsize=7)
        if case["wanted_ratio"]:
            axis.plot([case["wanted_ratio"]] * 2, [y - 0.4, y], color="black", linewidth=1.5)
    axis.plot([limit(c) for c in cases], [y - 0.2 for y in places], ".", color="#888888", label="FA3 / floor")
    axis.axvline(1.0, color="black", linewidth=0.7)
    axis.set_xscale("log")
    axis.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axis.minorticks_off()
    axis.set_yticks(list(places), [f"{c['case']}  ({c['ours_us']:.0f} us)" for c in cases], fontsize=8)
    axis.invert_yaxis()
    dtype = record.get("kv_dtype", "bfloat16")
    axis.set_title(f"slots in {record['order']}, page size {record['page_size']}, KV in {dtype}", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="default: every result of bench_decode.py")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "decode.png")
    args = parser.parse_args()
    order = ("runs", "interleaved", "permuted")
    records = [json.loads(p.read_text()) for p in args.files or RESULTS.glob("decode_*.json") if "quick" not in p.name]
    # Results made before the plan was measured have another headline.
    records = [r for r in records if r["cases"] and all("plan_us" in c for c in r["cases"])]
    records = sorted(records, key=lambda r: ("fp8" in r.get("kv_dtype", ""), r["page_size"], order.index(r["order"])))
    if not records:
        raise SystemExit(f"files: want results of bench_decode.py, got none in {RESULTS}")
    rows = max(len(r["cases"]) for r in records)
    columns = min(len(records), len(order))
    lines = -(-len(records) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.5 * columns, 1 + (0.5 + 0.26 * rows) * lines), squeeze=False)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    for axis, record in zip(axes.flat, records, strict=False):
        draw(axis, record)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8)
    figure.suptitle(
        f"Decode attention of one layer, {records[0]['gpu']}, {records[0]['heads']} query heads\n"
        f"on {records[0]['kv_heads']} KV heads of {records[0]['head_dim']}: attention + plan / 32.  Black: wanted",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))
    figure.savefig(args.out, dpi=90)
    print(args.out)


if __name__ == "__main__":
    main()
