"""The definition of every operation, in float64 and plain PyTorch.

Nothing here is fast, and nothing but ``segment_slots`` knows of segments: a test that compares with this file compares
with the mathematics.

    s = scale * q.k       s <- cap * tanh(s / cap) if a logit cap is set       p = exp(s) / (sum exp(s) + exp(sink))
    out = sum p * v       over the keys at positions <= the query's
"""

from __future__ import annotations

import torch

from flashcore_sglang.layout import CsrLayout


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of T queries over L keys.

    Args:
        q: [T, H, D]. k: [L, G, D]; query head h reads KV head h * G // H. v: [L, G, Dv].
        scale: multiplies q.k. logit_cap: 0 is none. visible: [T, L] bool; None: all.
        sinks: [H], the logit of a key without a value.
        k_scale, v_scale: what k and v, cached in a narrow type, are to be multiplied with: a number, [1] or [G].

    Returns:
        out [T, H, Dv] float64 and lse [T, H] float64 (natural); 0 and -inf where nothing is visible.
    """
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.double(), scaled(k, k_scale), scaled(v, v_scale)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    s = torch.einsum("thd,lhd->thl", q, k) * scale
    if logit_cap > 0:
        s = logit_cap * torch.tanh(s / logit_cap)
    if visible is not None:
        s = s.masked_fill(~visible[:, None, :], -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[None, :, None].expand(s.shape[0], -1, 1)], dim=2)
    lse = torch.logsumexp(s, dim=2)
    p = torch.exp(s - torch.where(lse.isinf(), 0.0, lse)[:, :, None])[:, :, : k.shape[0]]
    return torch.einsum("thl,lhd->thd", p, v), lse


def slots_of(req_to_token: torch.Tensor, req_pool_index: int, seq_len: int, page_size: int) -> torch.Tensor:
    """[seq_len] int64 slots of a request, from the first slot of each of its pages."""
    position = torch.arange(seq_len)
    first = req_to_token[req_pool_index].long()[position - position % page_size]
    return first // page_size * page_size + position % page_size


def extend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    causal: bool = True,
    window_left: int = -1,
    chunk: int = 0,
    custom_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last ``q_lens`` tokens of each request over its cache; decode is ``q_lens`` of 1.

    Args:
        q: [sum(q_lens), H, D], request after request. k_cache, v_cache: [slots, G, D], token-major.
        k_scale, v_scale: as for ``attention``.
        req_to_token, req_pool_indices, seq_lens: SGLang's tables on the CPU, see ``layout.build_layout_from_slots``.
        causal: False: every token sees all positions of its request.
        window_left: positions that a token sees before its own; -1: all.
        chunk: tokens of a chunk, which a token does not see past the beginning of; 0: none.
        custom_mask: [sum of q_lens * seq_lens] bool; in place of ``causal``, for each request its tokens by positions.

    Returns:
        [sum(q_lens), H, Dv] float64.
    """
    outs, at, mask_at = [], 0, 0
    for index, seq_len, q_len in zip(req_pool_indices.tolist(), seq_lens.tolist(), q_lens.tolist(), strict=True):
        slots = slots_of(req_to_token, index, seq_len, page_size)
        keys, queries = torch.arange(seq_len), torch.arange(seq_len - q_len, seq_len)[:, None]
        visible = keys <= queries if causal else torch.ones(q_len, seq_len, dtype=torch.bool)
        if custom_mask is not None:
            visible = custom_mask[mask_at : mask_at + q_len * seq_len].view(q_len, seq_len).bool()
            mask_at += q_len * seq_len
        if window_left >= 0:
            visible = visible & (keys >= queries - window_left)
        if chunk:
            visible = visible & (keys >= queries // chunk * chunk)
        out, _ = attention(
            q[at : at + q_len],
            k_cache[slots],
            v_cache[slots],
            scale=scale,
            logit_cap=logit_cap,
            visible=visible.to(q.device),
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        outs.append(out)
        at += q_len
    return torch.cat(outs) if outs else q.new_zeros(0, q.shape[1], v_cache.shape[2], dtype=torch.float64)


def scaled(values: torch.Tensor, scale: torch.Tensor | float | None) -> torch.Tensor:
    """[n, G, D] cached values as they are meant, float64."""
    factor = scale.double().view(1, -1, 1) if isinstance(scale, torch.Tensor) else 1.0 if scale is None else scale
    return values.double() * factor


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a union of key sets from the attention over each.

    Args:
        outs: [N, T, H, D]; lses: [N, T, H], natural, -inf where a set is empty.

    Returns:
        out [T, H, D] and lse [T, H], float64.
    """
    lse = torch.logsumexp(lses.double(), dim=0)
    weights = torch.exp(lses.double() - torch.where(lse.isinf(), 0.0, lse))
    return (weights[..., None] * outs.double()).sum(0), lse


def segment_slots(layout: CsrLayout, segment: int) -> torch.Tensor:
    """[end - begin] int64 slots of a segment, from its pages."""
    begin, end = layout.segment_positions[segment].tolist()
    position = torch.arange(begin, end)
    pages = layout.page_indices[layout.page_indptr[segment] : layout.page_indptr[segment + 1]].long()
    blocks = position // layout.page_size
    return pages[blocks - blocks[:1]] * layout.page_size + position % layout.page_size
