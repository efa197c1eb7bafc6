"""Serving throughput: SGLang with FA3, flashcore_sparse and FlashInfer, one server after the other, the same requests.

    python scripts/bench_serve.py                                       # every row, on a Hopper GPU; no download
    python scripts/bench_serve.py --backends fa3 ours --rows 1x256:8192+128:128 64x1:2048+128:128
    python scripts/bench_serve.py --defaults                            # every default of SGLang on
    python scripts/bench_serve.py --load 6                              # also TTFT and ITL, rounds of 6 s of arrivals
    python scripts/bench_serve.py --split-rows 1x256:8192+128:128       # also where a step's time goes
    python scripts/bench_serve.py --sglang-benchmark                    # also SGLang's own client, with a tokenizer
    python scripts/bench_serve.py --together --backends fa3 ours --server-args \\
        "--max-total-tokens 150000 --mem-fraction-static 0.93"          # both at a time, one row on each in turn
    python scripts/bench_serve.py --report scripts/results/serve.json   # table and chart of an earlier run

A row is groups x requests : shared + own prompt tokens : output tokens. The model is Llama-3.1-8B's shape with dummy
weights. Prompts are token ids, sent to /generate, so that no tokenizer is timed. A row's prefixes and prompts are put
into the radix cache first, save in the row marked "cold"; then all of its requests are sent at once. "steady" is
output tokens over the time of the steps in which all of them decode, from the server's own "gen throughput", a line of
which stands for equally many steps; "whole" is output tokens over the time from the first request sent to the last
answer read.

With ``--load`` the row's requests then arrive at random (Poisson) at 70 % of FA3's throughput, each with a few new
tokens at the end of its prompt: time to first token and between tokens, percentiles over all rounds, which the servers
of ``--together`` take in turn. A round before them is not measured, as kernels are compiled for batches of sizes that a
server has not seen; behind it ``/freeze_gc`` takes what lives by then out of Python's garbage collection, which else
stops a server for up to half a second in some round. Let the server that is not asked sleep (``--sleep-on-idle``).
Measure FA3 first: a server before it gets 70 % of its own throughput. ``--load-only`` takes FA3's from an earlier run
and measures nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from arrivals import Clients, load
from serve_report import ROWS, Row, cell, chart, client_table, figure, load_table, parse_row, split_table, table
from serving import Server, encode, must_succeed, running, send_all, stop_servers_on_sigterm
from sglang_benchmark import run as run_sglang_benchmark
from sglang_benchmark import toy_tokenizer
from step_split import profile

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
BACKENDS = {
    "fa3": ["--attention-backend", "fa3"],
    "ours": ["--attention-backend", "fa3", "--decode-attention-backend", "flashcore_sparse"],
    "ours-alone": ["--attention-backend", "flashcore_sparse"],
    "flashinfer": ["--attention-backend", "flashinfer"],
}
SMALL = ["--cuda-graph-bs-decode", "1", "32", "64", "256", "512"]
SMALL += ["--cuda-graph-backend-prefill", "disabled", "--mem-fraction-static", "0.8", "--max-running-requests", "512"]
Results = dict[str, Any]
SPLIT_TOKENS = 96
LOAD_SHARE = 0.7
"""Of FA3's throughput, the rate at which requests arrive."""


def warm(server: Server, row: Row) -> None:
    """Puts the row's prefixes, then its prompts, into the radix cache."""
    server.flush_cache()
    for prompts in (row.prefixes(), row.prompts()):
        bodies = [encode(p, 1) for p in prompts if p]
        must_succeed(asyncio.run(send_all(server.url, bodies)))


def measure(server: Server, row: Row) -> dict[str, Any]:
    """All requests of the row at once."""
    if row.cold:
        server.flush_cache()
    else:
        warm(server, row)
    bodies = [encode(p, row.output) for p in row.prompts()]
    offset, start = server.log_size(), time.perf_counter()
    answers = must_succeed(asyncio.run(send_all(server.url, bodies)))
    seconds = time.perf_counter() - start
    time.sleep(0.3)  # the log is written by another process
    rates = server.decode_rates(offset, row.batch)
    return {
        "steady": statistics.harmonic_mean(rates) if rates else None,
        "steady_lines": rates,
        "seconds": seconds,
        "whole": row.batch * row.output / seconds,
        "cached_tokens": statistics.median(a.cached_tokens for a in answers),
    }


def split_of(server: Server, row: Row) -> dict[str, float] | None:
    """The row once more, with the profiler on while all of its requests decode; rates would suffer from it. None if
    they ended before it saw enough steps."""
    warm(server, row)
    bodies = [encode(p, min(row.output, SPLIT_TOKENS)) for p in row.prompts()]
    offset = server.log_size()
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asyncio.run, send_all(server.url, bodies))
        while not answers.done() and not server.decode_rates(offset, row.batch):
            time.sleep(0.05)
        try:
            shares = None if answers.done() else profile(server)
        except TimeoutError as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            shares = None
        must_succeed(answers.result())
    return shares


def start(name: str, args: argparse.Namespace, model: str) -> AbstractContextManager[Server]:
    """The server of a backend."""
    arguments = ["--model-path", model, "--random-seed", "1", *BACKENDS.get(name, ["--attention-backend", name])]
    arguments += ["--decode-log-interval", "8"]
    arguments += [] if args.model_path else ["--load-format", "dummy"]
    arguments += [] if args.sglang_benchmark else ["--skip-tokenizer-init"]
    arguments += [] if args.defaults else SMALL
    return running([*arguments, *args.server_args.split()], Path(args.out) / f"serve_{name}.log")


def bench_row(server: Server, name: str, row: Row, args: argparse.Namespace, model: str, results: Results) -> None:
    """Measures a row on a server and adds it to ``results``."""
    mine = results["backends"].setdefault(name, {"ready_seconds": server.ready_seconds, "rows": {}})
    entry = mine["rows"][row.name] = measure(server, row)
    if row in args.split_rows:
        entry["split"] = split_of(server, row)
    if args.sglang_benchmark and not row.cold:
        workload = {key: value for key, value in asdict(row).items() if key not in ("target", "cold")}
        entry["sglang_benchmark"] = run_sglang_benchmark(server.url, model, **workload)
    print(f"{name:12s} {row.name:24s} {cell(entry['steady'])} steady {cell(entry['whole'])} whole", flush=True)


def bench_load(
    clients: Clients, servers: dict[str, Server], row: Row, args: argparse.Namespace, results: Results
) -> None:
    """The row under load on servers that have measured it, added to ``results``."""
    peer = "fa3" if figure(results, "fa3", row) else next(iter(servers))
    if throughput := figure(results, peer, row):
        measured = load(
            clients,
            servers,
            row,
            warm=warm,
            tokens_per_second=LOAD_SHARE * throughput,
            seconds=args.load,
            rounds=args.load_rounds,
        )
        for name, figures in measured.items():
            results["backends"][name]["rows"][row.name]["load"] = figures


def bench(args: argparse.Namespace, model: str, results: Results, save: Callable[[], None]) -> None:
    """Every row on every backend; ``save`` is called after each."""
    groups = [args.backends] if args.together else [[name] for name in args.backends]
    for names in groups:
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            starting = [pool.submit(stack.enter_context, start(name, args, model)) for name in names]
            servers = {name: future.result() for name, future in zip(names, starting, strict=True)}
            clients = stack.enter_context(Clients())
            for name, server in servers.items():
                print(f"{name}: ready in {server.ready_seconds:.0f} s", flush=True)
            for row in args.rows:
                for name, server in servers.items() if not args.load_only else ():
                    bench_row(server, name, row, args, model, results)
                    save()
                if args.load and row in (args.load_rows or args.rows):
                    bench_load(clients, servers, row, args, results)
                    save()


def machine() -> dict[str, str | None]:
    """Where and with what the figures were made."""

    def output(command: list[str]) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    gpu = output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    versions = {name: version(name) for name in ("sglang", "torch", "flashinfer-python")}
    return {"gpu": gpu, "revision": output(["git", "rev-parse", "HEAD"]), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["fa3", "ours", "flashinfer"],
                        help=f"of {', '.join(BACKENDS)}, or a name of SGLang's; in this order")  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=parse_row, default=list(ROWS), help="default: the table's")
    parser.add_argument("--defaults", action="store_true", help="SGLang's own defaults: all graphs, all features")
    parser.add_argument("--load", type=float, default=0.0, metavar="SECONDS", help="also TTFT and ITL under load")
    parser.add_argument("--load-rounds", type=int, default=1, help="of --load, on each server")
    parser.add_argument("--load-only", action="store_true", help="of rows that --out has figures of; implies --keep")
    parser.add_argument("--load-rows", nargs="+", type=parse_row, metavar="ROW", help="rows of --load; default: --rows")
    parser.add_argument("--split-rows", nargs="+", type=parse_row, default=[], metavar="ROW",
                        help="rows of --rows: also the shares of attention and the rest in a step")  # fmt: skip
    parser.add_argument("--together", action="store_true", help="all servers at a time on one GPU, row by row in turn")
    parser.add_argument("--sglang-benchmark", action="store_true", help="also SGLang's own client on every row")
    parser.add_argument("--model-path", help="a model instead of dummy weights")
    parser.add_argument("--server-args", default="", help="more arguments for every server, in one string")
    parser.add_argument("--out", default=str(ROOT / "scripts" / "results"), help="folder of JSON, chart and logs")
    parser.add_argument("--keep", action="store_true", help="add to the results in --out")
    parser.add_argument("--report", metavar="JSON", help="table and chart of an earlier run; nothing is started")
    args = parser.parse_args()
    stop_servers_on_sigterm()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = Path(args.report) if args.report else out / f"serve{'_defaults' if args.defaults else ''}.json"
    if args.load_only and not (args.load and path.exists()):
        parser.error(f"--load-only: want --load SECONDS and an earlier run in {path}")
    earlier = args.report or args.load_only or (args.keep and path.exists())
    results = json.loads(path.read_text()) if earlier else {"machine": machine(), "backends": {}}
    results["targets"] = {row.name: asdict(row) for row in ROWS}

    def save() -> None:
        path.write_text(json.dumps(results, indent=1))

    if not args.report:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
            if args.sglang_benchmark:
                toy_tokenizer(Path(folder), LLAMA_8B["vocab_size"])
            bench(args, args.model_path or folder, results, save)
    print("\n" + table(results))
    for text in (load_table(results), split_table(results), client_table(results)):
        if text:
            print("\n" + text)
    try:
        chart(results, path.with_suffix(".png"))
    except ImportError:
        print("chart: want matplotlib, got none; pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
