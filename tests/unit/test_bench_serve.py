"""What bench_serve.py makes of a server's log and of its measurements; no server is started."""

from __future__ import annotations

import argparse
import subprocess

import needs
import pytest

needs.sglang()  # aiohttp comes with it

import serve_report
import serving
import sglang_benchmark
import step_split

LOG = """\
[t] Decode batch, #running-req: 8, #token: 80, token usage: 0.11, cuda graph: True, gen throughput (token/s): 1.50, x
[t] Decode batch, #running-req: 7, #token: 80, token usage: 0.11, cuda graph: True, gen throughput (token/s): 2.50, x
[t] flashcore_sparse: decode step 20 by WGMMA
[t] Decode batch, #running-req: 8, #token: 80, token usage: 0.11, cuda graph: True, gen throughput (token/s): 3.50, x
[t] Decode batch, #running-req: 8, #token: 80, token usage: 0.11, cuda graph: True, gen throughput (token/s): 4.50, x
"""


def results(**rates: float) -> dict:
    row = serve_report.ROWS[0].name
    entry = {"seconds": 1.0, "whole": 1.0}
    return {
        "machine": {"gpu": "a GPU"},
        "backends": {name: {"rows": {row: {**entry, "steady": rate}}} for name, rate in rates.items()},
    }


def test_decode_rates_leave_out_other_batches_and_the_first_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("Decode batch, #running-req: 8, gen throughput (token/s): 9.00\n" + LOG)
    server = serving.Server("", log, subprocess.Popen(["true"]))
    assert server.decode_rates(log.read_text().index("[t]"), 8) == [3.5, 4.5]


def test_every_row_has_a_name_that_is_read_back():
    for row in serve_report.ROWS:
        assert serve_report.parse_row(row.name) == row
    assert serve_report.parse_row("2x3:40+5:6") == serve_report.Row(2, 3, 40, 5, 6)


def test_row_of_another_form_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="want groups x requests : shared"):
        serve_report.parse_row("2x3")


def test_prompts_share_their_groups_prefix_and_nothing_more():
    row = serve_report.Row(2, 3, 40, 5, 6)
    prompts = row.prompts()
    assert [len(p) for p in prompts] == [45] * 6
    assert prompts == row.prompts()
    assert {tuple(p[:40]) for p in prompts[:3]} == {tuple(row.prefixes()[0])}
    assert len({tuple(p[40:]) for p in prompts}) == 6


def test_table_says_ratio_and_target():
    text = serve_report.table(results(fa3=100.0, ours=360.0, flashinfer=120.0))
    assert "| 100 (1.0 s) | 360 (1.0 s) | 120 (1.0 s) | 3.60 | 3.5 | 3.00 |" in text


def test_step_is_split_by_kind_of_kernel():
    names = {
        "void flashcore::decode_kernel<Traits<128>>": 40,
        "flashcore::pager::forest_kernel": 5,
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": 10,
        "void cutlass::device_kernel<GemmUniversal>": 30,
        "rmsnorm": 10,
    }
    at, events = 100.0, [{"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 900}]
    for name, duration in names.items():
        events.append({"cat": "kernel", "name": name, "ts": at, "dur": duration})
        at += duration + 1.25
    shares = step_split.split(events)
    assert shares == pytest.approx({"attention": 0.5, "plan": 0.05, "products": 0.3, "rest": 0.1, "idle": 0.05})
    with pytest.raises(ValueError, match="want kernels"):
        step_split.split(events[:1])
    measured = results(ours=1000.0)
    measured["backends"]["ours"]["rows"][serve_report.ROWS[0].name]["split"] = shares
    assert "| ours | 256.00 | 128.00 | 12.80 | 76.80 | 25.60 | 12.80 |" in serve_report.split_table(measured)
    measured["backends"]["ours"]["rows"][serve_report.ROWS[0].name]["steady"] = None  # too short for the log's lines
    assert serve_report.split_table(measured) == ""


def test_chart_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    serve_report.chart(results(fa3=100.0, ours=360.0), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_toy_tokenizer_gives_back_the_ids_of_its_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    sglang_benchmark.toy_tokenizer(tmp_path, 50)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [3, 49, 0, 7, 7]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_sglang_benchmark_shares_prefixes_where_the_row_does():
    row = {"own": 8, "output": 16, "groups": 4}
    shared = sglang_benchmark.arguments("url", "model", requests=2, shared=64, **row)
    assert "generated-shared-prefix" in shared and shared[shared.index("--gsp-num-groups") + 1] == "4"
    alone = sglang_benchmark.arguments("url", "model", requests=1, shared=64, **row)
    assert "random-ids" in alone and alone[alone.index("--random-input-len") + 1] == "72"
