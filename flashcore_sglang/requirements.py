"""What flashcore_sparse does not serve, found before the first request. Nothing here imports SGLang or torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashcore_sglang.reach import Reach

GPU_HEAD_DIMS, GPU_MAX_RATIO = (64, 128, 256), 16
GPU_MAX_REQUESTS = 1024  # of a batch
PAGE_SIZES = (1, 16, 32, 64, 128)
"""The page sizes that SGLang users choose from."""
POOLS = ("MHATokenToKVPool", "SWAKVPool")
"""SGLang's pools of K and V by token: one for all layers, or one more for the layers with a sliding window."""

CAUSAL = ("decoder", "decoder_bidirectional")
"""Layers where a token sees those before it. SGLang's other backends, too, take the second for the first; only triton,
without CUDA graphs and chunks, lets the tokens of an image see each other."""
ENCODER = "encoder_only"
SPECULATIVE = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "NGRAM")
"""SGLang's ways of drafting whose drafts are verified here: as many for every request."""
E4M3 = "float8_e4m3fn"
"""What --kv-cache-dtype fp8_e4m3 stands for."""

SGLANG_MIN, SGLANG_MAX = "0.5.16", "0.5.23"
"""The range of SGLang releases that the tests cover; the first is the main target."""


@dataclass(frozen=True)
class LayerFacts:
    """One attention layer of the model. Heads are those of this tensor-parallel rank."""

    layer_id: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 64
    v_head_dim: int = 64
    attn_type: str = "decoder"
    is_cross_attention: bool = False
    sliding_window_size: int = -1  # positions seen before a token's own; -1: all
    in_window_pool: bool = False  # K and V are in the pool of layers with a window or chunks
    has_temperature: bool = False
    chunk: int = 0  # tokens of a chunk that a token does not see past the beginning of; 0: none
    logit_capping_method: str = "tanh"
    pos_encoding_mode: str = "NONE"

    @property
    def reach(self) -> Reach:
        """A window goes before chunks, and both before seeing ahead, which ``refusals`` names."""
        if self.sliding_window_size >= 0:
            return Reach(self.sliding_window_size)
        return Reach(chunk=self.chunk) if self.chunk else Reach(ahead=self.attn_type == ENCODER)


@dataclass(frozen=True)
class ServingFacts:
    """What decides whether a server can run; read off SGLang's ModelRunner by ``backend.facts_of``."""

    sglang_version: str
    device: str = "cpu"
    capability: str = ""
    page_size: int = 1
    model_dtype: str = "float32"
    kv_cache_dtype: str = "float32"
    pool_type: str = "MHATokenToKVPool"
    head_major_pool: bool = False
    is_mla: bool = False
    is_encoder_decoder: bool = False
    speculative_algorithm: str | None = None
    draft_tokens: int = 0  # that are verified at a time, for each request, or taken in by a draft model
    draft_branches: int = 1  # of the tree of drafts, at each of its tokens
    draft_steps: int = 0  # of the tree, of a draft model; 0: this is none
    draft_models: int = 0  # one after the other, each for one step and with a pool of its own; 0: this is none of them
    deterministic: bool = False
    max_requests: int = 0  # that may run at a time; 0: not known
    serves_prefill: bool = True
    context_parallel: int = 1
    torch_compile: bool = False
    plan_stream: bool = False  # of verification, beside the stream that runs it
    pdmux: bool = False  # prefill and decode on streams of their own, at a time
    triton_runs: bool = True
    layers: tuple[LayerFacts, ...] = ()


def version_tuple(version: str) -> tuple[int, ...]:
    """(0, 5, 16) of "0.5.16.post1"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def version_warning(version: str) -> str | None:
    """Newer than any release that was tested: it may work."""
    if version_tuple(version) > version_tuple(SGLANG_MAX):
        return f"sglang: want {SGLANG_MIN} to {SGLANG_MAX}, got {version}, which was not tested"
    return None


def _large_batches(facts: ServingFacts) -> bool:
    return facts.device == "cuda" and facts.max_requests > GPU_MAX_REQUESTS


def batch_warning(facts: ServingFacts) -> str | None:
    """Batches that the kernels do not serve."""
    if not _large_batches(facts):
        return None
    return (
        f"max_running_requests: want at most {GPU_MAX_REQUESTS} on a GPU, got {facts.max_requests}; larger batches are "
        f"decoded in PyTorch, slowly; start with --max-running-requests {GPU_MAX_REQUESTS}"
    )


def version_refusal(version: str) -> str | None:
    if version_tuple(version) < version_tuple(SGLANG_MIN):
        return f"sglang: want {SGLANG_MIN} to {SGLANG_MAX}, got {version}; pip install sglang=={SGLANG_MIN}"
    return None


def refusals(facts: ServingFacts) -> list[str]:
    """Every reason not to serve, as ``<argument>: want <rule>, got <value>; <remedy>``; empty if it can serve."""
    reasons = [version_refusal(facts.sglang_version)]
    reasons += _model_refusals(facts) + _pool_refusals(facts) + _option_refusals(facts)
    if facts.device == "cuda":
        reasons += _gpu_refusals(facts)
    return [reason for reason in reasons if reason]


def draft_refusals(facts: ServingFacts) -> list[str]:
    """Every reason not to serve the steps of a draft model, as ``refusals``; another backend can."""
    rows = facts.max_requests * facts.draft_branches
    reasons = [
        (
            "draft model: want layers that read everything, got windows or chunks"
            if not all(x.reach.everything for x in facts.layers)
            else None
        ),
        (f"draft model: want KV pool {POOLS[0]}, got {facts.pool_type}" if facts.pool_type != POOLS[0] else None),
        f"draft model: want one, got {facts.draft_models} layers with a pool each" if facts.draft_models else None,
        (
            f"draft model: want at most {GPU_MAX_REQUESTS} branches at a time, got {facts.max_requests} requests of "
            f"{facts.draft_branches}"
            if facts.device == "cuda" and rows > GPU_MAX_REQUESTS
            else None
        ),
    ]
    return [reason for reason in reasons if reason]


def _model_refusals(facts: ServingFacts) -> list[str | None]:
    other = "serve it with --attention-backend fa3 (GPU) or torch_native (CPU)"
    bad_heads = [x for x in facts.layers if x.num_kv_heads < 1 or x.num_q_heads % x.num_kv_heads]
    types = sorted({x.attn_type for x in facts.layers if x.attn_type not in (*CAUSAL, ENCODER)})
    part = any(x.attn_type == ENCODER and not x.reach.ahead for x in facts.layers)
    capping = sorted({x.logit_capping_method for x in facts.layers if x.logit_capping_method != "tanh"})
    return [
        f"model: want attention layers, got none; {other}" if not facts.layers else None,
        f"model: want logits capped by tanh, got {', '.join(capping)}; {other}" if capping else None,
        (
            f"model: want positions encoded outside of attention, got another encoding; {other}"
            if any(x.pos_encoding_mode != "NONE" for x in facts.layers)
            else None
        ),
        f"model: want multi-head or grouped-query attention, got MLA; {other}" if facts.is_mla else None,
        (
            f"model: want a decoder, got an encoder-decoder; {other}"
            if facts.is_encoder_decoder or any(x.is_cross_attention for x in facts.layers)
            else None
        ),
        f"model: want encoder layers that see everything, got windows or chunks; {other}" if part else None,
        f"model: want attention of a decoder or an encoder, got attention of type {', '.join(types)}; {other}"
        if types
        else None,
        (
            f"model: want query heads a multiple of KV heads, got {bad_heads[0].num_q_heads} on "
            f"{bad_heads[0].num_kv_heads} in layer {bad_heads[0].layer_id}; choose another --tp-size"
            if bad_heads
            else None
        ),
        (
            f"model: want a constant softmax scale, got one that depends on the position; {other}"
            if any(x.has_temperature for x in facts.layers)
            else None
        ),
    ]


def _gpu_refusals(facts: ServingFacts) -> list[str | None]:
    """What the kernels of csrc/attention do not take."""
    chunks = sorted({x.chunk for x in facts.layers if x.chunk % facts.page_size})
    shapes = {(x.num_q_heads, x.num_kv_heads, x.head_dim, x.v_head_dim) for x in facts.layers}
    dims = sorted({d for _, _, *both in shapes for d in both})
    ratios = sorted({h // g for h, g, *_ in shapes if g})
    return [
        (
            f"GPU: want a Hopper (compute capability 9.0), got {facts.capability}; serve with "
            "--attention-backend flashinfer"
            if not facts.capability.startswith("9.")
            else None
        ),
        (
            f"kv_cache_dtype: want bfloat16 or float16 on a GPU, got {facts.kv_cache_dtype}; "
            "start with --dtype bfloat16"
            if facts.kv_cache_dtype == "float32"
            else None
        ),
        (
            f"kv_cache_dtype: want {facts.model_dtype}, the model's, or {E4M3}, got {facts.kv_cache_dtype}; start with "
            "--kv-cache-dtype auto or fp8_e4m3"
            if facts.kv_cache_dtype not in (facts.model_dtype, E4M3)
            else None
        ),
        (
            f"dtype: want bfloat16 or float16 on a GPU with a KV cache of {E4M3}, got {facts.model_dtype}; "
            "start with --dtype bfloat16"
            if facts.kv_cache_dtype == E4M3 and facts.model_dtype not in ("bfloat16", "float16")
            else None
        ),
        (
            f"model: want head dim {', '.join(map(str, GPU_HEAD_DIMS))}, the same for K and V, got {dims}; "
            "serve it with --attention-backend fa3"
            if any(d not in GPU_HEAD_DIMS for d in dims) or any(k != v for _, _, k, v in shapes)
            else None
        ),
        (
            f"page_size: want pages that fill the chunks of attention, got {facts.page_size} and chunks of {chunks}; "
            "start with another --page-size"
            if chunks
            else None
        ),
        (
            f"model: want at most {GPU_MAX_RATIO} query heads per KV head, got {ratios[-1]}; choose another --tp-size"
            if ratios and ratios[-1] > GPU_MAX_RATIO
            else None
        ),
    ]


def _pool_refusals(facts: ServingFacts) -> list[str | None]:
    dtypes = ("float32", "bfloat16", "float16", E4M3)
    return [
        (
            f"page_size: want one of {', '.join(map(str, PAGE_SIZES))}, got {facts.page_size}; "
            "start with --page-size 64"
            if facts.page_size not in PAGE_SIZES
            else None
        ),
        (
            f"kv_cache_dtype: want {', '.join(dtypes)}, got {facts.kv_cache_dtype}; start with --kv-cache-dtype auto "
            "or fp8_e4m3"
            if facts.kv_cache_dtype not in dtypes
            else None
        ),
        (
            "KV pool: want token-major K and V, got head-major; unset SGLANG_USE_HND_KVCACHE"
            if facts.head_major_pool
            else None
        ),
        (
            f"KV pool: want {' or '.join(POOLS)}, got {facts.pool_type}; leave out the options that select another pool"
            if facts.pool_type not in POOLS and not facts.is_mla
            else None
        ),
    ]


def _option_refusals(facts: ServingFacts) -> list[str | None]:
    return [
        (
            f"speculative_algorithm: want one of {', '.join(SPECULATIVE)}, got {facts.speculative_algorithm}; choose "
            "another --speculative-algorithm"
            if facts.speculative_algorithm and facts.speculative_algorithm not in SPECULATIVE
            else None
        ),
        (
            "deterministic inference: want another backend for prefill where layers have a sliding window or chunks, "
            "as sums here depend on how a prompt is cut; start with --attention-backend fa3 --decode-attention-backend "
            "flashcore_sparse"
            if facts.deterministic and facts.serves_prefill and not all(x.reach.everything for x in facts.layers)
            else None
        ),
        (
            f"deterministic inference: want at most {GPU_MAX_REQUESTS} requests at a time, got {facts.max_requests}; "
            f"start with --max-running-requests {GPU_MAX_REQUESTS}"
            if facts.deterministic and _large_batches(facts)
            else None
        ),
        (
            "deterministic inference: want a GPU, as the order of the sums on a CPU depends on the batch, got "
            f"{facts.device}; leave out --enable-deterministic-inference"
            if facts.deterministic and facts.device != "cuda"
            else None
        ),
        (
            f"context parallelism: want 1, got {facts.context_parallel}; leave out --dcp-size and --attn-cp-size"
            if facts.context_parallel > 1
            else None
        ),
        (
            "torch.compile: want it off on a CPU, got on; leave out --enable-torch-compile"
            if facts.torch_compile and facts.device == "cpu"
            else None
        ),
        (
            "plan stream: want verification planned on the stream that runs it, got another one, which may overwrite "
            "the tables of the step before; leave out SGLANG_ENABLE_OVERLAP_PLAN_STREAM"
            if facts.plan_stream and facts.draft_tokens and facts.device == "cuda"
            else None
        ),
        (
            "pdmux: want one stream, got several, and the pager needs every SM at once; leave out --enable-pdmux"
            if facts.pdmux and facts.device == "cuda"
            else None
        ),
        (
            f"page_size: want 1 where Triton cannot run, got {facts.page_size}; set TRITON_INTERPRET=1 or "
            "--page-size 1, as SGLang allocates larger pages with a Triton kernel"
            if facts.page_size > 1 and not facts.triton_runs
            else None
        ),
        f"device: want cpu or cuda, got {facts.device}" if facts.device not in ("cpu", "cuda") else None,
    ]
