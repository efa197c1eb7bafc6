"""The GPU's attention of a draft model, for the GPU tests and the benchmark."""

from __future__ import annotations

from flashcore_sglang.gpu_attention import GpuAttention
from flashcore_sglang.requirements import LayerFacts, ServingFacts


def draft_attention(
    heads: tuple[int, int, int],
    *,
    layers: int,
    branches: int,
    steps: int,
    page_size: int,
    num_pages: int,
    max_batch: int,
    max_context: int,
) -> GpuAttention:
    """In bfloat16, of its steps alone; ``heads``: query heads, KV heads, head dim."""
    kv_heads, head_dim = heads[1:]
    facts = ServingFacts(
        "0.5.16",
        device="cuda",
        page_size=page_size,
        model_dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        draft_branches=branches,
        draft_steps=steps,
        serves_prefill=False,
        layers=tuple(LayerFacts(i, heads[0], kv_heads, head_dim, head_dim) for i in range(layers)),
    )
    return GpuAttention(
        facts,
        num_pages=num_pages,
        window_pages=1,
        max_batch=max_batch,
        max_context=max_context,
        max_extend=1,
        sharing=True,
        device="cuda",
        branches=branches,
    )
