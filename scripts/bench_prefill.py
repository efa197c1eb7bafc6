"""Prefill and extend attention of one layer: ours beside FA3 and FlashInfer on the same physical pages, in one run.

    python scripts/bench_prefill.py                              # every case, 32/8 heads, bf16
    python scripts/bench_prefill.py --cases d128 --variants runs:1 --peers fa3
    python scripts/bench_prefill.py --peers none --rounds 2      # ours alone
    python scripts/bench_prefill.py --kv-dtype fp8_e4m3 --peers fa3  # FA3 casts q to e4m3 too, as SGLang does

A variant is an order of the pages (runs: a request's are consecutive; permuted) and a page size. Each contender is
captured in a CUDA graph; rounds are interleaved, each in an order of its own, as the clock under a kernel is what the
power of those before it has left; the L2 is flushed before every replay, and the figure of a round is the median of its
replays. "ours" is attention plus 1/32 of pager and work list, which run once per step for all layers. FA3 is called as
SGLang calls it for prefill; "contiguous" is its varlen function on K and V without pages. Drafts to verify have a
tree's mask, which FA3 is not given, as it takes none. The matrix product is 8192^3 in bf16, in the same rounds.
Results go to scripts/results/prefill.json (prefill_fp8_e4m3.json), and a chart beside it if matplotlib is there.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import RESULTS, ROOT, Flusher, captured, machine, microseconds
from torch import Tensor

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peers  # noqa: E402
from gpu.extend_cases import Batch, Extend, batch, tree_mask  # noqa: E402

from flashcore_sglang.config import cost_model  # noqa: E402
from flashcore_sglang.gpu_extend import Visible  # noqa: E402

HEADS, KV_HEADS, LAYERS = 32, 8, 32
KV_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Case:
    """``groups`` as for ``extend_cases.batch``; ``wanted``: least ratio to FA3, by variant; ``tree``: of drafts."""

    head_dim: int
    groups: list[tuple[int, list[tuple[int, int]]]]
    wanted: dict[str, float]
    tree: bool = False


def prompts(count: int, tokens: int) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(0, [(0, tokens)] * count)]


PROMPT_VARIANTS = {"runs:1": 1.08, "runs:64": 1.08, "permuted:1": 1.0, "permuted:16": 1.0}
CASES = {
    "d128 16384 x 1": Case(128, prompts(1, 16384), PROMPT_VARIANTS),
    "d128 8192 x 2": Case(128, prompts(2, 8192), PROMPT_VARIANTS),
    "d128 2048 x 8": Case(128, prompts(8, 2048), PROMPT_VARIANTS | {"runs:1": 1.1, "runs:64": 1.1}),
    "d64 16384 x 1": Case(64, prompts(1, 16384), {"runs:1": 1.05}),
    "d64 8192 x 2": Case(64, prompts(2, 8192), {"runs:1": 1.05}),
    "d64 2048 x 8": Case(64, prompts(8, 2048), {"runs:1": 1.05}),
    "d256 8192 x 1": Case(256, prompts(1, 8192), {"runs:1": 1.0}),
    "d128 2048 on 30720": Case(128, [(0, [(30720, 2048)])], {"runs:1": 1.12}),
    "d128 256 x 8 on 8192 shared": Case(128, [(8192, [(0, 8)] * 256)], {"runs:1": 2.6}),
    "d128 64 x 8 on 8192 shared": Case(128, [(8192, [(0, 8)] * 64)], {"runs:1": 2.5}),
    "d128 64 trees of 8 on 8192 shared": Case(128, [(8192, [(0, 8)] * 64)], {"runs:1": 2.5}, tree=True),
    "d128 64 x 64 on 8192 shared": Case(128, [(8192, [(0, 64)] * 64)], {"runs:1": 1.1}),
}


def visible_pairs(b: Batch) -> int:
    """(query token, key) pairs of causal attention."""
    ends, new = b.seq_lens.long(), b.q_lens.long()
    return int((new * (ends - new) + new * (new + 1) // 2).sum())


def fa3(b: Batch, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    table = (b.table[1:, :: b.page_size] // b.page_size).cuda()
    starts = torch.cat([torch.zeros(1), b.q_lens.cumsum(0)]).int().cuda()
    return peers.fa3_paged(q, k, v, b.page_size, table, b.seq_lens.int().cuda(), starts, int(b.q_lens.max()))


def fa3_contiguous(b: Batch, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    slots = torch.cat([b.table[r + 1, : int(n)] for r, n in enumerate(b.seq_lens)]).long().cuda()
    keys, values = k[slots], v[slots]
    starts_q, starts_k = (
        torch.cat([torch.zeros(1), x.cumsum(0)]).int().cuda() for x in (b.q_lens.long(), b.seq_lens.long())
    )
    return lambda: flash_attn_varlen_func(
        q, keys, values, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=int(b.q_lens.max()),
        max_seqlen_k=int(b.seq_lens.max()), softmax_scale=q.shape[2] ** -0.5, causal=True,
    )  # fmt: skip


def flashinfer_prefill(b: Batch, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    import flashinfer

    blocks = (b.seq_lens + b.page_size - 1) // b.page_size
    pages = b.table[1:, :: b.page_size] // b.page_size
    starts = torch.cat([torch.zeros(1), b.q_lens.cumsum(0)]).int().cuda()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(peers.WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "NHD", backend="auto"
    )
    wrapper.plan(
        starts,
        torch.cat([torch.zeros(1), blocks.cumsum(0)]).int().cuda(),
        torch.cat([pages[r, : int(n)] for r, n in enumerate(blocks)]).cuda(),
        ((b.seq_lens - 1) % b.page_size + 1).int().cuda(),
        HEADS,
        KV_HEADS,
        q.shape[2],
        b.page_size,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    cache = tuple(x.view(-1, b.page_size, *x.shape[1:]) for x in (k, v))
    return lambda: wrapper.run(q, cache)


PEERS = {"fa3": fa3, "contiguous": fa3_contiguous, "flashinfer": flashinfer_prefill}


def run_case(name: str, variant: str, args: argparse.Namespace, flush: Callable[[], None]) -> dict[str, Any]:
    case = CASES[name]
    order, page_size = variant.split(":")
    b = batch(case.groups, int(page_size), order)
    q = torch.randn(b.num_tokens, HEADS, case.head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(b.num_slots, KV_HEADS, case.head_dim, device="cuda", dtype=q.dtype) for _ in range(2))
    k, v = (x.to(KV_DTYPES[args.kv_dtype]) for x in (k, v))
    extend = Extend(
        b, HEADS, KV_HEADS, case.head_dim, cost_model=cost_model("hopper"), kv_dtype=k.dtype,
        visible=Visible.MASKED if case.tree else Visible.CAUSAL,
    )  # fmt: skip
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "custom_mask": tree_mask(b).cuda() if case.tree else None}
    out = torch.empty_like(q)
    extend.plan()
    extend.kernels.attend(q, k, v, out, **options)
    results: dict[str, Any] = {"case": name, "variant": variant}
    contenders = {
        "attention": captured(lambda: extend.kernels.attend(q, k, v, out, **options)),
        "plan": captured(extend.plan),
    }
    calls = []  # own the buffers that the graphs use
    for peer in [p for p in args.peers.split(",") if p in PEERS]:
        try:
            call = PEERS[peer](b, q, k, v)
            theirs = call()
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            results[f"{peer}_difference"] = float(
                (theirs.view_as(out).float() - out.float()).norm() / out.float().norm()
            )
            contenders[peer] = captured(call)
            calls.append(call)
        except Exception as e:
            results[f"{peer}_error"] = f"{type(e).__name__}: {e}"[:300]
    if args.product:
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        contenders["product"] = captured(lambda: a @ a)
    rounds: dict[str, list[float]] = {c: [] for c in contenders}
    shuffled = random.Random(0)
    for _ in range(args.rounds):
        for contender in shuffled.sample(list(contenders), len(contenders)):
            rounds[contender].append(microseconds(contenders[contender], flush, args.replays))
    us = {c: statistics.median(t) for c, t in rounds.items()}
    flops = 4 * visible_pairs(b) * HEADS * case.head_dim
    ours = us["attention"] + us["plan"] / LAYERS
    tflops = {c: flops / t / 1e6 for c, t in us.items() if c not in ("plan", "product")} | {"ours": flops / ours / 1e6}
    if "product" in us:
        tflops["product"] = 2 * 8192**3 / us["product"] / 1e6
    wanted = case.wanted.get(variant)
    results |= {
        "us": us,
        "rounds": rounds,
        "ours_us": ours,
        "tflops": tflops,
        "wanted_ratio": wanted,
        "ratio": us["fa3"] / ours if "fa3" in us else None,
    }
    cells = [f"{name:33s} {variant:11s} {ours:8.1f} us {tflops['ours']:5.0f} TF (plan {us['plan']:5.1f})"]
    for peer in PEERS:
        if peer in us:
            cells.append(f"{peer} {tflops[peer]:4.0f} TF {us[peer] / ours:5.2f}x d={results[f'{peer}_difference']:.0e}")
        elif f"{peer}_error" in results:
            cells.append(f"{peer} failed: {results[f'{peer}_error'][:80]}")
    if "product" in us:
        cells.append(f"product {tflops['product']:4.0f} TF")
    print("  ".join(cells) + (f"  want {wanted}x" if wanted else ""), flush=True)
    return results


def draw(record: dict[str, Any], path: pathlib.Path) -> None:
    """Bars of TFLOP/s by case and contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = record["cases"]
    names = [n for n in ("ours", *PEERS, "product") if any(n in c["tflops"] for c in cases)]
    labels = {"ours": "flashcore_sparse", "fa3": "FA3, same pages", "contiguous": "FA3, contiguous",
              "flashinfer": "FlashInfer", "product": "matrix product"}  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(10, 0.42 * len(cases) + 1.5))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [row + (i - (len(names) - 1) / 2) * height for row in range(len(cases))]
        axes.barh(at, [c["tflops"].get(name, 0) for c in cases], height, label=labels[name])
    axes.set_yticks(range(len(cases)), [f"{c['case']}, {c['variant']}" for c in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"TFLOP/s, {record['gpu']}, bf16, KV {record['kv_dtype']}, {HEADS} query heads on {KV_HEADS}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="comma-separated parts of case names; default all")
    parser.add_argument("--variants", default="", help="order:page_size, ...; default those with a wanted ratio")
    parser.add_argument("--kv-dtype", default="bfloat16", choices=tuple(KV_DTYPES))
    parser.add_argument("--peers", default="fa3,contiguous,flashinfer", help="of fa3, contiguous, flashinfer; none")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--product", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    torch.manual_seed(0)
    flush = Flusher()
    parts = [c.strip() for c in args.cases.split(",") if c.strip()]
    variants = [x for x in args.variants.split(",") if x]
    results = [
        run_case(name, variant, args, flush)
        for name, case in CASES.items()
        if not parts or any(part in name for part in parts)
        for variant in variants or case.wanted
    ]
    ratios = [r["ratio"] for r in results if r["ratio"]]
    if ratios:
        print(f"geometric mean of FA3 / ours: {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}")
    record = machine() | {"heads": HEADS, "kv_heads": KV_HEADS, "kv_dtype": args.kv_dtype, "cases": results}
    path = pathlib.Path(args.out)
    path.mkdir(parents=True, exist_ok=True)
    name = "prefill" if args.kv_dtype == "bfloat16" else f"prefill_{args.kv_dtype}"
    (path / f"{name}.json").write_text(json.dumps(record, indent=1))
    try:
        draw(record, path / f"{name}.png")
    except ImportError as e:
        print(f"no chart: {e}")


if __name__ == "__main__":
    main()
