"""Samples of decode steps: what the log, /metrics and the server's reasons make of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flashcore_sglang import env
from flashcore_sglang.config import CostModel
from flashcore_sglang.metrics import SampleMetrics, metric_labels
from flashcore_sglang.statistics import UNSHARED_SAMPLES, Sample, SampleLog, least_prefix, no_sharing_reason

SHARED = Sample("WGMMA", 100, 8, 9, tokens_wanted=8000, tokens_read=2000, pager_us=41.5)
UNSHARED = Sample("WGMMA", 100, 8, 8, tokens_wanted=8000, tokens_read=8000, pager_us=41.5)
COST = CostModel(token_cost=1, segment_cost=20, partial_cost=5)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return SampleLog(logging.getLogger("flashcore_sglang"), COST, None)


def test_line_says_path_tokens_ratio_and_time(log, caplog):
    log(SHARED)
    assert "100 decode steps in 0.0 s by WGMMA; the last: 8 requests in 9 segments" in caplog.text
    assert "KV tokens read 2000 of 8000 (4.00x shared), pager 42 us" in caplog.text


def test_unshared_traffic_is_explained_once(log, caplog):
    for _ in range(3 * UNSHARED_SAMPLES):
        log(UNSHARED)
    assert caplog.text.count("nothing is shared by these requests") == 1
    assert "their first 30 tokens" in caplog.text


def test_traffic_that_shares_now_and_then_is_not_explained(log, caplog):
    for _ in range(3 * UNSHARED_SAMPLES):
        log(UNSHARED)
        log(SHARED)
    assert "nothing is shared" not in caplog.text


def test_least_prefix_is_what_the_pager_decides_by():
    assert least_prefix(COST, 2) == 30
    assert least_prefix(COST, 5) == 12
    assert least_prefix(CostModel(), 2) == 1


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"sharing": False}, "FLASHCORE_SHARING=0"),
        ({"deterministic": True}, "--enable-deterministic-inference"),
        ({"radix_cache": False}, "--disable-radix-cache"),
        ({"radix_cache": False, "pd_decode": True}, "--disaggregation-decode-enable-radix-cache"),
    ],
)
def test_reason_names_what_to_change(facts, words):
    reason = no_sharing_reason(**{"sharing": True, "deterministic": False, "radix_cache": True, **facts})
    assert reason and words in reason


def test_no_reason_where_prefixes_are_shared():
    assert no_sharing_reason(sharing=True, deterministic=False, radix_cache=True) is None


def runner(rank: int = 0, **args) -> SimpleNamespace:
    values = {"enable_metrics": True, "enable_metrics_for_all_schedulers": False, "model_path": "a model"}
    values |= {"served_model_name": "name", "extra_metric_labels": {"team": "blue"}, **args}
    ranks = SimpleNamespace(attn_tp_rank=rank, tp_rank=rank, pp_rank=0)
    return SimpleNamespace(server_args=SimpleNamespace(**values), ps=ranks)


def test_labels_are_those_of_sglang():
    assert metric_labels(runner()) == {"model_name": "name", "tp_rank": "0", "pp_rank": "0", "team": "blue"}


def test_one_rank_reports_unless_all_are_asked_for():
    assert metric_labels(runner(enable_metrics=False)) is None
    assert metric_labels(runner(rank=1)) is None
    assert metric_labels(runner(rank=1, enable_metrics_for_all_schedulers=True)) is not None


def test_two_backends_of_a_process_publish_the_same_families():
    pytest.importorskip("prometheus_client")
    labels = {"model_name": "two"}
    for backend in (SampleMetrics(labels), SampleMetrics(labels)):
        backend(SHARED)
    from prometheus_client import REGISTRY

    where = {"path": "WGMMA", "model_name": "two"}
    assert REGISTRY.get_sample_value("flashcore:kv_tokens_wanted_total", where) == 2 * 100 * 8000
    assert REGISTRY.get_sample_value("flashcore:sharing_ratio", where) == 4.0


def test_another_process_serves_the_metrics(tmp_path):
    """As in SGLang: the scheduler counts, the HTTP server reads the files of all processes."""
    pytest.importorskip("prometheus_client")
    write = (
        "from flashcore_sglang.metrics import SampleMetrics; from flashcore_sglang.statistics import Sample; "
        "SampleMetrics({'model_name': 'm'})(Sample('WGMMA', 10, 8, 9, 8000, 2000, 41.5))"
    )
    read = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess; r = CollectorRegistry(); "
        "multiprocess.MultiProcessCollector(r); print(generate_latest(r).decode())"
    )
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", write], env=environ, check=True)
    page = subprocess.run([sys.executable, "-c", read], env=environ, check=True, capture_output=True, text=True).stdout
    assert 'flashcore:kv_tokens_read_total{model_name="m",path="WGMMA"} 20000.0' in page
    assert 'flashcore:segments{model_name="m",path="WGMMA"} 9.0' in page


def test_recording_wants_a_folder_that_exists(monkeypatch):
    monkeypatch.setenv("FLASHCORE_RECORD", "/no/such/folder/batch.npz")
    with pytest.raises(ValueError, match="FLASHCORE_RECORD: want a file in a folder that exists"):
        env.record()
