"""The real server, over HTTP, beside SGLang's torch_native on the same model, prompts and machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import needs
import pytest

needs.sglang()

import requests
import torch
from serve import workload
from serve.programs import Programs
from serve.server import ROOT, SERVE, Server, launch, running, stop

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="compares CPU backends; the GPU has its own serving benchmark"
    ),
]

COMMON = ["--enable-cache-report", "--random-seed", "1"]
PROMPTS = ["The capital of France is", "The capital of France is", "One, two, three,"]
METRICS = ["--enable-metrics"] if find_spec("prometheus_client") else []


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def model() -> str:
    """Folder of the default model."""
    command = [sys.executable, str(ROOT / "scripts" / "prepare_model.py"), "--dtype", "float32"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.fixture(scope="module")
def expected(logs) -> workload.Results:
    """What torch_native answers. It is stopped before ours starts: both want all cores."""
    with running(SERVE, logs / "torch_native.log", ["--attention-backend", "torch_native", *COMMON]) as server:
        return workload.run(server.url)


@pytest.fixture(scope="module")
def ours(logs, expected):
    record = str(logs / "batch.npz")
    arguments = [*COMMON, *METRICS]
    with running(SERVE, logs / "ours.log", arguments, FLASHCORE_LOG_INTERVAL="20", FLASHCORE_RECORD=record) as server:
        yield server


@pytest.fixture(scope="module")
def results(ours) -> workload.Results:
    return workload.run(ours.url)


def test_every_answer_equals_torch_native(results, expected):
    assert results.texts == expected.texts
    assert "Paris" in results.texts["plain"]


def test_system_prompt_has_a_thousand_tokens(results):
    assert results.prompt_tokens >= 1000


def test_later_turns_hit_the_cache(results, expected):
    assert results.cached_tokens == expected.cached_tokens
    assert results.cached_tokens[2] > results.cached_tokens[1] > 0


def test_shared_prompts_are_served_at_least_as_fast_as_torch_native(results, expected, capsys):
    ratio = max(results.rates) / max(expected.rates)
    with capsys.disabled():
        print(
            f"\n8 requests on one prompt of {results.prompt_tokens} tokens, output tokens per second: flashcore_sparse "
            f"{max(results.rates):.1f}, torch_native {max(expected.rates):.1f}, ratio {ratio:.2f}"
        )
    assert ratio >= 1.0


def test_log_says_what_served_and_how_much_was_shared(ours, results):
    log = ours.text()
    assert "flashcore_sparse serves on cpu with PyTorch attention over CSR segments" in log
    shared = [float(x) for x in re.findall(r"\(([\d.]+)x shared\)", log)]
    assert max(shared) > 4, f"8 requests on one long prompt read it once: {shared}"


@pytest.mark.skipif(not METRICS, reason="prometheus_client is not installed")
def test_metrics_count_what_was_read_and_wanted(ours, results):
    page = requests.get(f"{ours.url}/metrics", timeout=10).text
    values = {name: float(value) for name, value in re.findall(r"^flashcore:(\w+)\{.*\} (\S+)$", page, re.M)}
    assert values["decode_steps_total"] >= 20
    assert values["kv_tokens_wanted_total"] > 2 * values["kv_tokens_read_total"] > 0
    assert {"sharing_ratio", "segments", "pager_microseconds"} <= values.keys()


def test_recorded_batch_is_explained(ours, results, logs):
    command = [sys.executable, "-m", "flashcore_sglang", "explain", str(logs / "batch.npz")]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert re.search(r"8 requests share 1,\d{3} tokens", text), text


def test_request_longer_than_the_context_is_refused_and_others_live_on(ours, expected):
    def too_long(_):
        messages = workload.user("word " * 9000)
        body = {"model": workload.MODEL, "messages": messages, "max_tokens": 8}
        return requests.post(f"{ours.url}/v1/chat/completions", json=body, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        refused = pool.submit(too_long, None)
        good = pool.submit(workload.chat, ours.url, workload.user("What is the capital of France?"))
        assert refused.result().status_code == 400
        assert re.search(r"longer than|exceeds", refused.result().text), refused.result().text
        assert workload.text_of(good.result()) == expected.texts["plain"]
    assert ours.is_alive()


def test_aborted_request_does_not_disturb_the_others(ours, expected):
    with pytest.raises(requests.exceptions.Timeout):
        body = {"model": workload.MODEL, "messages": workload.user("Count to a thousand."), "max_tokens": 500}
        requests.post(f"{ours.url}/v1/chat/completions", json={**body, "ignore_eos": True}, timeout=1)
    answer = workload.chat(ours.url, workload.user("What is the capital of France?"))
    assert workload.text_of(answer) == expected.texts["plain"]


@pytest.fixture(scope="module")
def engine(model) -> Programs:
    """Runs while it is not asked for yet."""
    return Programs("engine_main.py", [(model, json.dumps(PROMPTS))])


@pytest.fixture(scope="module")
def refused(logs) -> Iterator[Server]:
    """A server that ends before it serves."""
    server = launch(SERVE, logs / "refused.log", ["--page-size", "8", "--kv-cache-dtype", "fp8_e5m2"])
    yield server
    stop(server)


def test_pages_of_16_and_chunked_prefill_answer_the_same(logs, model, expected, ours, results, engine, refused):
    """Started by `sglang serve`; chunks of 256 tokens, pages of 16. Not timed: those of the next tests start beside."""
    stop(ours)
    command = ["sglang", "serve", "--model-path", model, "--served-model-name", workload.MODEL]
    command += ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "16"]
    command += ["--attention-backend", "flashcore_sparse", "--page-size", "16", "--chunked-prefill-size", "256"]
    with running(command, logs / "page16.log", COMMON, HF_HUB_OFFLINE="1") as server:
        assert workload.run(server.url, rounds=1).texts == expected.texts
        assert "page size 16" in server.text()


def test_engine_decodes_with_ours_beside_another_prefill_backend(engine, model):
    run = engine[model, json.dumps(PROMPTS)]
    assert "flashcore_sparse serves on cpu" in run.stdout + run.stderr, run.stderr[-3000:]
    answers = json.loads(re.search(r"^ANSWERS (.*)$", run.stdout, re.M)[1])
    assert "Paris" in answers[0]
    assert answers[0] == answers[1]


def test_unsupported_options_stop_the_server_with_every_reason(refused):
    assert refused.process.wait(240) != 0
    log = refused.text()
    assert "page_size: want one of 1, 16, 32, 64, 128, got 8; start with --page-size 64" in log
    assert "kv_cache_dtype: want float32, bfloat16, float16, float8_e4m3fn, got float8_e5m2; start with" in log
