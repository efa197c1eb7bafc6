"""What SGLang's ModelRunner says of the model, the pool and the server."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.version import __version__ as sglang_version

from flashcore_sglang.plugin import NAME, triton_runs
from flashcore_sglang.requirements import LayerFacts, ServingFacts


def facts_of(model_runner: Any) -> ServingFacts:
    """What decides whether this server can run."""
    args, pool = model_runner.server_args, model_runner.token_to_kv_pool
    device = torch.device(model_runner.device).type
    layers = [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]
    in_window_pool = getattr(pool, "layers_mapping", {})
    drafts = getattr(model_runner, "is_draft_worker", False)
    several_models = _speculation(args, "enable_multi_layer_eagle")
    return ServingFacts(
        sglang_version=sglang_version,
        device=device,
        capability="{}.{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else "",
        page_size=model_runner.page_size,
        model_dtype=str(model_runner.dtype).removeprefix("torch."),
        kv_cache_dtype=str(model_runner.kv_cache_dtype).removeprefix("torch."),
        pool_type=type(pool).__name__,
        head_major_pool=any(getattr(p, "use_hnd", False) for p in _pools(pool)),
        is_mla=model_runner.use_mla_backend,
        is_encoder_decoder=model_runner.model_config.is_encoder_decoder,
        speculative_algorithm=args.speculative_algorithm,
        draft_tokens=_draft_tokens(model_runner),
        draft_branches=_speculation(args, "speculative_eagle_topk") or 1,
        draft_steps=(_speculation(args, "speculative_num_steps") or 0) if drafts else 0,
        draft_models=(_speculation(args, "speculative_num_steps") or 0) if drafts and several_models else 0,
        deterministic=bool(args.enable_deterministic_inference),
        max_requests=model_runner.req_to_token_pool.size,  # a PD decode server's table has more rows
        serves_prefill=serves_prefill(model_runner),
        context_parallel=max(getattr(args, "dcp_size", 1) or 1, getattr(args, "attn_cp_size", 1) or 1),
        torch_compile=bool(getattr(args, "enable_torch_compile", False)),
        plan_stream=os.environ.get("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "").lower() in ("1", "true", "yes", "y"),
        pdmux=bool(getattr(args, "enable_pdmux", False)),
        triton_runs=triton_runs(),
        layers=tuple(
            LayerFacts(
                layer_id=x.layer_id,
                num_q_heads=x.tp_q_head_num,
                num_kv_heads=x.tp_k_head_num,
                head_dim=x.qk_head_dim,
                v_head_dim=x.v_head_dim,
                attn_type=getattr(x.attn_type, "value", x.attn_type),
                is_cross_attention=x.is_cross_attention,
                sliding_window_size=x.sliding_window_size,
                in_window_pool=in_window_pool.get(x.layer_id, (0, False))[1],
                has_temperature=getattr(x, "xai_temperature_len", -1) > 0,
                chunk=(getattr(model_runner, "attention_chunk_size", None) or 0) if x.use_irope else 0,
                logit_capping_method=x.logit_capping_method if x.logit_cap else "tanh",
                pos_encoding_mode=x.pos_encoding_mode,
            )
            for x in layers
        ),
    )


def largest_batch(model_runner: Any) -> int:
    """Rows of a batch: SGLang pads to equal parts for the ranks of data-parallel attention, in both halves of two-batch
    overlap."""
    multiple = 2 * (getattr(model_runner.server_args, "tp_size", None) or 1)
    return -(-model_runner.req_to_token_pool.size // multiple) * multiple


def serves_prefill(model_runner: Any) -> bool:
    """Whether new tokens come to this backend, too; True where that is not known."""
    args = model_runner.server_args
    names = [getattr(args, "prefill_attention_backend", None), getattr(args, "attention_backend", None)]
    if getattr(model_runner, "is_draft_worker", False):
        names.insert(0, _speculation(args, "speculative_draft_attention_backend"))
    return next((name for name in names if name), NAME) == NAME


def _speculation(args: Any, name: str) -> Any:
    """An argument of speculative decoding as SGLang resolved it. From 0.5.23 on ``args`` are what the operator gave."""
    try:
        from sglang.srt.runtime_context import get_spec

        return getattr(get_spec(), name)
    except (ImportError, ValueError, AttributeError):  # 0.5.16, which resolves ``args``; or nothing is published
        return getattr(args, name, None)


def _draft_tokens(model_runner: Any) -> int:
    """Drafts of a request that come to this backend at a time, to be verified or taken in; 0: none do."""
    args = model_runner.server_args
    drafts = _speculation(args, "speculative_num_draft_tokens") or 0
    gets_them = serves_prefill(model_runner) or _speculation(args, "speculative_attention_mode") == "decode"
    return drafts if gets_them else 0


def _pools(pool: Any) -> list[Any]:
    """The pool, or the two of a model that has sliding windows in some layers."""
    return [p for p in (getattr(pool, "full_kv_pool", None), getattr(pool, "swa_kv_pool", None)) if p] or [pool]
