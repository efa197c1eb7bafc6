"""What is refused at the start: each reason names what it wants, what it got, and the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashcore_sglang.device_pager import MAX_ROWS
from flashcore_sglang.requirements import (
    GPU_MAX_REQUESTS,
    PAGE_SIZES,
    LayerFacts,
    ServingFacts,
    batch_warning,
    refusals,
    version_refusal,
    version_tuple,
    version_warning,
)

GOOD = ServingFacts(sglang_version="0.5.16", layers=(LayerFacts(0, 9, 3),))


def layer(**changes) -> tuple[LayerFacts, ...]:
    return (LayerFacts(0, 8, 8), replace(LayerFacts(1, 8, 8), **changes))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_supported_configuration_is_not_refused(page_size, dtype):
    assert refusals(replace(GOOD, page_size=page_size, kv_cache_dtype=dtype)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sglang_version": "0.5.15.post2"},
            "sglang: want 0.5.16 to 0.5.23, got 0.5.15.post2; pip install sglang==0.5.16",
        ),
        ({"is_mla": True}, "model: want multi-head or grouped-query attention, got MLA; serve it with"),
        ({"is_encoder_decoder": True}, "model: want a decoder, got an encoder-decoder; serve it with"),
        ({"layers": layer(is_cross_attention=True)}, "model: want a decoder, got an encoder-decoder"),
        (
            {"layers": layer(attn_type="encoder_only", sliding_window_size=64)},
            "model: want encoder layers that see everything, got windows or chunks",
        ),
        (
            {"layers": layer(attn_type="other")},
            "want attention of a decoder or an encoder, got attention of type other",
        ),
        ({"layers": layer(num_kv_heads=3)}, "want query heads a multiple of KV heads, got 8 on 3 in layer 1"),
        ({"layers": layer(has_temperature=True)}, "model: want a constant softmax scale"),
        ({"page_size": 48}, "page_size: want one of 1, 16, 32, 64, 128, got 48; start with --page-size 64"),
        ({"kv_cache_dtype": "float8_e5m2"}, "got float8_e5m2; start with --kv-cache-dtype auto or fp8_e4m3"),
        ({"head_major_pool": True}, "KV pool: want token-major K and V, got head-major; unset SGLANG_USE_HND_KVCACHE"),
        (
            {"pool_type": "PageMajorMHATokenToKVPool"},
            "KV pool: want MHATokenToKVPool or SWAKVPool, got PageMajorMHATokenToKVPool",
        ),
        (
            {"speculative_algorithm": "DFLASH"},
            "speculative_algorithm: want one of EAGLE, EAGLE3, NEXTN, STANDALONE, NGRAM",
        ),
        ({"deterministic": True}, "deterministic inference: want a GPU"),
        ({"layers": ()}, "model: want attention layers, got none"),
        ({"layers": layer(logit_capping_method="sigmoid")}, "model: want logits capped by tanh, got sigmoid"),
        ({"layers": layer(pos_encoding_mode="ALIBI")}, "model: want positions encoded outside of attention"),
        ({"context_parallel": 2}, "context parallelism: want 1, got 2; leave out --dcp-size"),
        ({"torch_compile": True}, "torch.compile: want it off on a CPU, got on; leave out --enable-torch-compile"),
        (
            {"page_size": 16, "triton_runs": False},
            "page_size: want 1 where Triton cannot run, got 16; set TRITON_INTERPRET=1",
        ),
        ({"device": "xpu"}, "device: want cpu or cuda, got xpu"),
    ],
)
def test_refusal_names_rule_value_and_remedy(changes, message):
    [reason] = refusals(replace(GOOD, **changes))
    assert message in reason


GPU = replace(GOOD, device="cuda", capability="9.0", kv_cache_dtype="bfloat16", model_dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pdmux": True}, "pdmux: want one stream, got several"),
        ({"plan_stream": True, "draft_tokens": 4}, "leave out SGLANG_ENABLE_OVERLAP_PLAN_STREAM"),
        ({"capability": "8.0"}, "GPU: want a Hopper (compute capability 9.0), got 8.0"),
        (
            {"kv_cache_dtype": "float32", "model_dtype": "float32"},
            "kv_cache_dtype: want bfloat16 or float16 on a GPU, got float32",
        ),
        (
            {"model_dtype": "float16"},
            "kv_cache_dtype: want float16, the model's, or float8_e4m3fn, got bfloat16; start with",
        ),
        (
            {"kv_cache_dtype": "float8_e4m3fn", "model_dtype": "float32"},
            "dtype: want bfloat16 or float16 on a GPU with a KV cache of float8_e4m3fn, got float32",
        ),
        ({"layers": (LayerFacts(0, 8, 8, 96, 96),)}, "want head dim 64, 128, 256, the same for K and V, got [96]"),
        (
            {"layers": (LayerFacts(0, 8, 8, 128, 64),)},
            "want head dim 64, 128, 256, the same for K and V, got [64, 128]",
        ),
        (
            {"deterministic": True, "layers": (LayerFacts(0, 8, 8, 128, 128, sliding_window_size=4),)},
            "deterministic inference: want another backend for prefill where layers have a sliding window",
        ),
        (
            {"deterministic": True, "max_requests": 2048},
            "deterministic inference: want at most 1024 requests at a time, got 2048; start with",
        ),
        ({"layers": (LayerFacts(0, 32, 1),)}, "model: want at most 16 query heads per KV head, got 32"),
    ],
)
def test_gpu_refusal_names_rule_value_and_remedy(changes, message):
    assert refusals(GPU) == []
    assert refusals(replace(GPU, kv_cache_dtype="float8_e4m3fn")) == []
    [reason] = refusals(replace(GPU, **changes))
    assert message in reason


def test_every_reason_is_listed():
    assert len(refusals(replace(GOOD, is_mla=True, page_size=3, kv_cache_dtype="float8_e5m2", device="npu"))) == 4


@pytest.mark.parametrize(
    ("version", "parts"), [("0.5.16", (0, 5, 16)), ("0.5.23.post1", (0, 5, 23)), ("0.6.0rc1", (0, 6, 0)), ("main", ())]
)
def test_version_tuple_reads_the_release(version, parts):
    assert version_tuple(version) == parts


@pytest.mark.parametrize("version", ["0.5.16", "0.5.20", "0.5.23", "0.6.0"])
def test_supported_and_newer_versions_are_not_refused(version):
    assert version_refusal(version) is None


def test_version_newer_than_tested_is_warned_of():
    assert version_warning("0.5.23") is None
    assert version_warning("0.6.0") == "sglang: want 0.5.16 to 0.5.23, got 0.6.0, which was not tested"


def test_batches_that_the_kernels_do_not_serve_are_announced():
    assert GPU_MAX_REQUESTS == MAX_ROWS
    assert batch_warning(replace(GPU, max_requests=MAX_ROWS)) is None
    assert batch_warning(replace(GPU, device="cpu", max_requests=2 * MAX_ROWS)) is None
    message = batch_warning(replace(GPU, max_requests=2 * MAX_ROWS))
    assert "max_running_requests: want at most 1024 on a GPU, got 2048" in message
    assert refusals(replace(GPU, max_requests=2 * MAX_ROWS)) == []
