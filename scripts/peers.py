"""FA3 and FlashInfer on the same pages as ours.

Each maker plans once and returns the call that a decode step makes for a layer, which may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu.decode_cases import Forest, Level, nodes_of
from torch import Tensor

WORKSPACE_BYTES = 512 << 20


def fa3_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_size: int,
    table: Tensor,
    lens: Tensor,
    starts: Tensor,
    most: int,
    window_left: int = -1,
    **options: Any,
) -> Callable[[], Any]:
    """FA3 over a table of pages, causal; `starts`: where each request's queries begin, `most`: of one request.

    Over an e4m3 cache as SGLang calls it: q cast to e4m3 in every layer, the scales of K and V expanded."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    keys, values = (x.view(-1, page_size, *x.shape[1:]) for x in (k, v))
    if k.dtype == torch.float8_e4m3fn:
        scale = torch.ones((), device="cuda").expand(table.shape[0], k.shape[1])
        options |= {"k_descale": scale, "v_descale": scale}
    return lambda: flash_attn_with_kvcache(
        q=q.to(k.dtype),
        k_cache=keys,
        v_cache=values,
        page_table=table,
        cache_seqlens=lens,
        cu_seqlens_q=starts,
        max_seqlen_q=most,
        softmax_scale=q.shape[2] ** -0.5,
        causal=True,
        window_size=(window_left, -1 if window_left < 0 else 0),
        softcap=0.0,
        **options,
    )


def fa3(f: Forest, q: Tensor, k: Tensor, v: Tensor, max_context: int) -> Callable[[], Any]:
    """SGLang's call: precomputed scheduler metadata, FA3's own choice of splits, rows of `max_context` tokens."""
    from sgl_kernel.flash_attn import get_scheduler_metadata

    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    pages = f.table[1:, :: f.page_size] // f.page_size
    table = torch.zeros(f.batch, -(-max_context // f.page_size), dtype=torch.int32, device="cuda")
    table[:, : pages.shape[1]] = pages.cuda()
    lens = f.seq_lens.cuda()
    starts = torch.arange(f.batch + 1, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=f.batch,
        max_seqlen_q=1,
        max_seqlen_k=int(lens.max()),
        num_heads=heads,
        num_heads_k=kv_heads,
        headdim=head_dim,
        cache_seqlens=lens,
        qkv_dtype=k.dtype,
        cu_seqlens_q=starts,
        page_size=f.page_size,
        causal=True,
        has_softcap=False,
        num_splits=0,
    )
    return fa3_paged(q, k, v, f.page_size, table, lens, starts, 1, num_splits=0, scheduler_metadata=metadata)


def flashinfer_decode(f: Forest, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """FlashInfer's batch decode on tensor cores, planned for exactly this batch: what its CUDA-graph mode pads to the
    largest batch is left out, which favours it."""
    import flashinfer

    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    blocks = (f.seq_lens + f.page_size - 1) // f.page_size
    pages = f.table[1:, :: f.page_size] // f.page_size
    held = torch.arange(pages.shape[1]) < blocks[:, None]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), blocks.cumsum(0).int()])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        indptr.cuda(),
        pages[held].int().cuda(),
        ((f.seq_lens - 1) % f.page_size + 1).int().cuda(),
        heads,
        kv_heads,
        head_dim,
        f.page_size,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    cache = tuple(x.view(-1, f.page_size, kv_heads, head_dim) for x in (k, v))
    return lambda: wrapper.run(q, cache)


def flashinfer_cascade(f: Forest, levels: Sequence[Level], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """FlashInfer's multi-level cascade, told the levels of the tree."""
    import flashinfer

    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    batch, pages = f.batch, f.table[1:, :: f.page_size] // f.page_size
    qo, kv, indices, last, at = [], [], [], [], 0
    for depth, (nodes, tokens) in enumerate(levels):
        node = nodes_of(nodes, batch)
        first = torch.cat([torch.ones(1, dtype=torch.bool), node[1:] != node[:-1]]).nonzero().flatten()
        ends = f.seq_lens[first] - at * f.page_size if depth == len(levels) - 1 else torch.full_like(first, tokens)
        blocks = (ends + f.page_size - 1) // f.page_size
        held = torch.arange(pages.shape[1] - at) < blocks[:, None]
        qo.append(torch.cat([first, torch.tensor([batch])]).int().cuda())
        kv.append(torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)]).int().cuda())
        indices.append(pages[first, at:][held].int().cuda())
        last.append(((ends - 1) % f.page_size + 1).int().cuda())
        at += -(-tokens // f.page_size)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        len(levels), torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "NHD"
    )
    wrapper.plan(qo, kv, indices, last, heads, kv_heads, head_dim, f.page_size, q_data_type=q.dtype)
    cache = tuple(x.view(-1, f.page_size, kv_heads, head_dim) for x in (k, v))
    return lambda: wrapper.run(q, cache)
