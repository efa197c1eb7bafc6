"""Decode attention of one layer: ours beside FA3 and FlashInfer on the same physical pages, in one run.

    python scripts/bench_decode.py                               # every case, page size 1, 32/8 heads, d 128, bf16
    python scripts/bench_decode.py --cases shared --order interleaved --page-size 64 --peers fa3
    python scripts/bench_decode.py --peers none --rounds 3       # ours alone

Each contender is captured in a CUDA graph once per case; rounds are interleaved (ours, peer, ours, peer ...), the L2
is flushed before every replay, and the figure of a round is the median of its replays. FA3 gets SGLang's call:
precomputed scheduler metadata, its own choice of splits, a page table with the stride of the maximum context. "ours" is
attention plus 1/32 of the work list, which is made once per step for all layers; the CUDA pager is not in it.
Results go to scripts/results/decode_<order>_p<page size>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu.decode_cases import Decode, Forest, forest  # noqa: E402

from flashcore_sglang.config import cost_model  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_CONTEXT = 131072 + 4096

# name: (levels of (nodes, tokens), own tokens of each request, least ratio to FA3 wanted)
CASES: dict[str, tuple[list[tuple[int, int]], list[int] | None, float]] = {
    "shared 16: 8192 + 512": ([(1, 8192), (16, 512)], None, 2.5),
    "shared 64: 8192 + 512": ([(1, 8192), (64, 512)], None, 4.5),
    "shared 256: 8192 + 256": ([(1, 8192), (256, 256)], None, 8.0),
    "shared 256: 2048 + 256": ([(1, 2048), (256, 256)], None, 3.0),
    "shared 64: 32768 + 512": ([(1, 32768), (64, 512)], None, 9.0),
    "shared 32: 90112 + 4096": ([(1, 90112), (32, 4096)], None, 5.2),
    "dense 1 x 8192": ([(1, 8192)], None, 1.6),
    "dense 1 x 131072": ([(1, 131072)], None, 1.06),
    "dense 16 x 8192": ([(16, 8192)], None, 1.04),
    "dense 128 x 2048": ([(128, 2048)], None, 1.02),
    "dense 256 x 1024": ([(256, 1024)], None, 1.02),
    "dense 64 x 8192": ([(64, 8192)], None, 0.99),
    "dense 8 x 32768": ([(8, 32768)], None, 0.99),
    "skewed 1 x 131072 + 31 x 4096": ([(32, 131072)], [131072] + [4096] * 31, 0.99),
    "tree 1,4,64": ([(1, 1024), (4, 512), (64, 256)], None, 2.0),
    "tree 1,2,64": ([(1, 1024), (2, 256), (64, 256)], None, 2.0),
    "tree 1,16,256": ([(1, 4096), (16, 512), (256, 128)], None, 2.0),
    "tree 1,8,64,512": ([(1, 2048), (8, 256), (64, 128), (512, 64)], None, 2.0),
    "tree 4,32,256,1024": ([(4, 512), (32, 256), (256, 64), (1024, 32)], None, 2.0),
    "tree 8,256": ([(8, 4096), (256, 256)], None, 3.8),
}


class Flusher:
    """Fills the L2 with other lines by reading 256 MiB. Writing would leave 50 MB of dirty lines, whose way back to
    memory would be billed to the kernel that is timed next: 17 us, more than a short one takes."""

    def __init__(self) -> None:
        self.junk = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
        self.sum = torch.zeros((), dtype=torch.int64, device="cuda")

    def __call__(self) -> None:
        torch.sum(self.junk, dim=0, out=self.sum)


def graphed(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
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


def microseconds(graph: torch.cuda.CUDAGraph, flush: Callable[[], None], replays: int) -> float:
    times = []
    for _ in range(replays):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) * 1e3


def fa3(f: Forest, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    from sgl_kernel.flash_attn import (
        flash_attn_with_kvcache,
        get_scheduler_metadata,
    )

    pages = f.table[1:, :: f.page_size] // f.page_size
    table = torch.zeros(f.batch, -(-MAX_CONTEXT // f.page_size), dtype=torch.int32, device="cuda")
    table[:, : pages.shape[1]] = pages.cuda()
    lens = f.seq_lens.cuda()
    starts = torch.arange(f.batch + 1, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=f.batch,
        max_seqlen_q=1,
        max_seqlen_k=int(lens.max()),
        num_heads=HEADS,
        num_heads_k=KV_HEADS,
        headdim=HEAD_DIM,
        cache_seqlens=lens,
        qkv_dtype=q.dtype,
        cu_seqlens_q=starts,
        page_size=f.page_size,
        causal=True,
        has_softcap=False,
        num_splits=0,
    )
    keys, values = (x.view(-1, f.page_size, KV_HEADS, HEAD_DIM) for x in (k, v))
    return lambda: flash_attn_with_kvcache(
        q=q,
        k_cache=keys,
        v_cache=values,
        page_table=table,
        cache_seqlens=lens,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        softmax_scale=HEAD_DIM**-0.5,
        causal=True,
        window_size=(-1, -1),
        softcap=0.0,
        num_splits=0,
        scheduler_metadata=metadata,
    )


def _pages_of(f: Forest) -> tuple[list[torch.Tensor], torch.Tensor]:
    blocks = (f.seq_lens + f.page_size - 1) // f.page_size
    pages = f.table[1:, :: f.page_size] // f.page_size
    return [pages[r, : int(n)] for r, n in enumerate(blocks)], (f.seq_lens - 1) % f.page_size + 1


def flashinfer_decode(f: Forest, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    import flashinfer

    pages, last = _pages_of(f)
    indptr = torch.tensor([0, *(p.numel() for p in pages)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        indptr.cuda(),
        torch.cat(pages).cuda(),
        last.int().cuda(),
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        f.page_size,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    cache = tuple(x.view(-1, f.page_size, KV_HEADS, HEAD_DIM) for x in (k, v))
    return lambda: wrapper.run(q, cache)


def flashinfer_cascade(f: Forest, levels: list[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    import flashinfer

    batch, pages = f.batch, f.table[1:, :: f.page_size] // f.page_size
    qo, kv, indices, last, at = [], [], [], [], 0
    for nodes, tokens in levels:
        blocks = -(-tokens // f.page_size)
        owners = torch.arange(nodes) * batch // nodes
        qo.append(torch.cat([owners, torch.tensor([batch])]).int().cuda())
        kv.append((torch.arange(nodes + 1) * blocks).int().cuda())
        indices.append(pages[owners, at : at + blocks].reshape(-1).contiguous().cuda())
        last.append(torch.full((nodes,), (tokens - 1) % f.page_size + 1, dtype=torch.int32, device="cuda"))
        at += blocks
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        len(levels), torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD"
    )
    wrapper.plan(qo, kv, indices, last, HEADS, KV_HEADS, HEAD_DIM, f.page_size, q_data_type=q.dtype)
    cache = tuple(x.view(-1, f.page_size, KV_HEADS, HEAD_DIM) for x in (k, v))
    return lambda: wrapper.run(q, cache)


def run_case(name: str, args: argparse.Namespace, flush: Callable[[], None]) -> dict[str, Any]:
    levels, lens, wanted = CASES[name]
    f = forest(levels, args.page_size, args.order, lens)
    q = torch.randn(f.batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(f.num_slots, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    layout = f.layout(cost_model("hopper"))
    decode, out = Decode(layout, HEADS, KV_HEADS, HEAD_DIM), torch.empty_like(q)
    scale = HEAD_DIM**-0.5
    decode.schedule()
    contenders = {
        "attention": graphed(lambda: decode.run(q, k, v, out, scale=scale)),
        "schedule": graphed(decode.schedule),
    }
    results: dict[str, Any] = {"case": name}
    makers = {"fa3": lambda: fa3(f, q, k, v), "decode": lambda: flashinfer_decode(f, q, k, v)}
    if len(levels) > 1:
        makers["cascade"] = lambda: flashinfer_cascade(f, levels, q, k, v)
    for peer in [p for p in args.peers.split(",") if p in makers]:
        try:
            call = makers[peer]()
            theirs = call()
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            decode.run(q, k, v, out, scale=scale)
            results[f"{peer}_difference"] = float(
                (theirs.view_as(out).float() - out.float()).norm() / out.float().norm()
            )
            contenders[peer] = graphed(call)
        except Exception as e:
            results[f"{peer}_error"] = f"{type(e).__name__}: {e}"[:300]
    rounds: dict[str, list[float]] = {c: [] for c in contenders}
    for _ in range(args.rounds):
        for contender, graph in contenders.items():
            rounds[contender].append(microseconds(graph, flush, args.replays))
    us = {c: statistics.median(t) for c, t in rounds.items()}
    tokens, pairs = layout.tokens_stored, layout.tokens_wanted
    floor = tokens * KV_HEADS * HEAD_DIM * 4 / args.copy_gbps / 1e3
    ours = us["attention"] + us["schedule"] / 32
    results |= {
        "us": us,
        "rounds": rounds,
        "ours_us": ours,
        "bytes_floor_us": floor,
        "percent_of_floor": 100 * floor / ours,
        "mma_floor_us": pairs * HEADS * HEAD_DIM * 4 / 600e6,
        "segments": layout.num_segments,
        "unique_gbps": tokens * KV_HEADS * HEAD_DIM * 4 / ours / 1e3,
        "tflops": pairs * HEADS * HEAD_DIM * 4 / ours / 1e6,
        "wanted_ratio": wanted,
        "ratio": us["fa3"] / ours if "fa3" in us else None,
    }
    rates = f"{results['unique_gbps']:6.0f} GB/s {results['tflops']:5.0f} TF"
    floors = f"floor {floor:6.1f}  mma {results['mma_floor_us']:5.1f}"
    cells = [f"{name:30s} {ours:8.1f} us (schedule {us['schedule']:5.1f})  {floors}  {rates}"]
    for peer in ("fa3", "decode", "cascade"):
        if peer in us:
            cells.append(f"{peer} {us[peer]:8.1f} {us[peer] / ours:5.2f}x d={results[f'{peer}_difference']:.0e}")
        elif f"{peer}_error" in results:
            cells.append(f"{peer} failed: {results[f'{peer}_error'][:60]}")
    print("  ".join(cells) + f"  want {wanted}x", flush=True)
    return results


def copy_bandwidth(flush: Callable[[], None]) -> float:
    """GB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    times = []
    for _ in range(10):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * a.numel() / statistics.median(times) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="comma-separated parts of case names; default all")
    parser.add_argument("--order", default="runs", choices=("runs", "interleaved", "permuted"))
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--peers", default="fa3,decode,cascade", help="of fa3, decode, cascade; none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--out", default=str(ROOT / "scripts" / "results"))
    args = parser.parse_args()
    flush = Flusher()
    args.copy_gbps = copy_bandwidth(flush)
    empty = torch.zeros(1, device="cuda")
    args.empty_us = microseconds(graphed(lambda: empty.zero_()), flush, 20)
    print(f"a graph of one empty kernel: {args.empty_us:.1f} us (part of every figure below)")
    print(
        f"{torch.cuda.get_device_name()}  copy {args.copy_gbps:.0f} GB/s  "
        f"page size {args.page_size}  order {args.order}",
        flush=True,
    )
    wanted = [c.strip() for c in args.cases.split(",") if c.strip()]
    results = [run_case(c, args, flush) for c in CASES if not wanted or any(w in c for w in wanted)]
    ratios = [r["ratio"] for r in results if r["ratio"]]
    if ratios:
        print(f"geometric mean of FA3 / ours: {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    path = pathlib.Path(args.out)
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "revision": revision,
        "copy_gbps": args.copy_gbps,
        "empty_graph_us": args.empty_us,
        "page_size": args.page_size,
        "order": args.order,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "cases": results,
    }
    (path / f"decode_{args.order}_p{args.page_size}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
