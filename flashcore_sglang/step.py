"""What one forward pass asks of attention: SGLang's ForwardBatch, in every mode, as ranges of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Step:
    """Rows of a batch and their query tokens, the last of each row.

    Attributes:
        req_pool_indices: [B] row of ``req_to_token`` of each request.
        seq_lens:    [B] tokens of each request, the new ones included.
        q_lens:      [B] new tokens of each request; None: decode, one each.
        num_tokens:  all new tokens.
        max_queries: at least the most new tokens of one request.
        draft_tokens: new tokens of every request if the step verifies drafts, else 0.
        custom_mask: [sum of q_lens * seq_lens] bool, for a tree of drafts; None: causal.
    """

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    q_lens: torch.Tensor | None
    num_tokens: int
    max_queries: int
    draft_tokens: int = 0
    custom_mask: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.req_pool_indices.numel()

    @property
    def is_decode(self) -> bool:
        return self.q_lens is None


def read_step(forward_batch: Any) -> Step:
    """The step of a ForwardBatch, or of the view of one that is replayed. Reads nothing of the device."""
    mode, rows = forward_batch.forward_mode, forward_batch.req_pool_indices
    if mode.is_decode():
        return Step(rows, forward_batch.seq_lens, None, rows.numel(), 1)
    if mode.is_target_verify():
        return _verify_step(forward_batch, rows)
    tokens = getattr(forward_batch, "extend_num_tokens", None)
    if tokens is None:
        tokens = int(forward_batch.extend_seq_lens.sum())
    lens = getattr(forward_batch, "extend_seq_lens_cpu", None)
    longest = max(map(int, lens)) if lens is not None and len(lens) else tokens
    return Step(rows, forward_batch.seq_lens, forward_batch.extend_seq_lens, int(tokens), longest)


def _verify_step(forward_batch: Any, rows: torch.Tensor) -> Step:
    """Of a verification the lengths leave the drafts out. Drafts of one branch are causal: their mask says no more."""
    spec = forward_batch.spec_info
    if getattr(spec, "ragged_verify_layout", None) is not None:
        raise ValueError("speculative decoding: want as many drafts for every request, got a ragged layout")
    drafts = spec.draft_token_num
    branches = getattr(spec, "topk", None)
    mask = None if branches == 1 else getattr(spec, "custom_mask", None)
    seq_lens = forward_batch.seq_lens + drafts
    q_lens = torch.full_like(forward_batch.seq_lens, drafts)
    return Step(rows, seq_lens, q_lens, rows.numel() * drafts, drafts, drafts, mask)
