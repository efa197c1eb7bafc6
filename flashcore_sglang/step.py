"""What forward passes ask of attention: SGLang's ForwardBatch, in every mode, as ranges of positions."""

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
        draft_tokens: new tokens of every request if the step verifies drafts, or if a draft model takes in what was
                     verified; else 0.
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


@dataclass(frozen=True)
class Drafts:
    """The steps in which a draft model writes a tree of drafts for each request: one token of each branch at a time.

    In step i a branch sees its request's tokens and its own first i + 1 drafts. SGLang keeps the drafts of all branches
    behind the request's tokens, branch after branch. Where pages have several tokens and there are several branches,
    each begins on a page of its own, whose beginning is a copy of the request's last tokens if they do not fill theirs.

    Attributes:
        req_pool_indices: [B] row of ``req_to_token`` of each request.
        seq_lens: [B] tokens of each request, without drafts.
        branches: of each request.
        steps:    slots of a branch. The draft model runs once less: its last step only names tokens.
    """

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    branches: int
    steps: int

    @property
    def num_rows(self) -> int:
        """Branches of all requests."""
        return self.req_pool_indices.numel() * self.branches

    def lens(self) -> torch.Tensor:
        """[steps - 1, num_rows] tokens that each branch sees in each step."""
        seq_lens = self.seq_lens[:, None].expand(-1, self.branches).flatten()
        return seq_lens + torch.arange(1, self.steps, device=seq_lens.device)[:, None]

    def table(self, req_to_token: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots of each branch's positions, in a table of their own, and each branch's row in it.

        Row 0 is nobody's, as in SGLang's table. Reads the longest length on the host.
        """
        lens, last = self.seq_lens[:, None, None], req_to_token.shape[1] - 1
        own = lens // page_size * page_size
        size = (lens - own + self.steps + page_size - 1) // page_size * page_size
        position = torch.arange(int(self.seq_lens.max()) + self.steps, device=lens.device)
        branch = torch.arange(self.branches, device=lens.device)[:, None]
        position = (position + torch.where(position >= own, branch * size, 0)).clamp_(0, last)
        slots = req_to_token[self.req_pool_indices.long()[:, None, None], position].flatten(0, 1)
        return torch.cat([torch.zeros_like(slots[:1]), slots]), torch.arange(1, self.num_rows + 1, device=lens.device)


def read_step(forward_batch: Any) -> Step:
    """The step of a ForwardBatch, or of the view of one that is replayed. Reads nothing of the device."""
    mode, rows = forward_batch.forward_mode, forward_batch.req_pool_indices
    if mode.is_decode():
        return Step(rows, forward_batch.seq_lens, None, rows.numel(), 1)
    if mode.is_target_verify():
        return _verify_step(forward_batch, rows)
    if mode.is_draft_extend_v2() and (drafts := _draft_extend_tokens(forward_batch)):
        # The view of a replay has the buffers of the largest batch; padded rows are shorter than their new tokens.
        size = forward_batch.batch_size
        seq_lens = forward_batch.seq_lens[:size].clamp(min=drafts)
        return Step(rows[:size], seq_lens, torch.full_like(seq_lens, drafts), size * drafts, drafts, drafts)
    lens = getattr(forward_batch, "extend_seq_lens_cpu", None)
    if lens is not None and len(lens):
        counts = [int(n) for n in lens]
        # Data-parallel attention counts the tokens that pad a batch in ``extend_num_tokens``, and none of them here.
        return Step(rows, forward_batch.seq_lens, forward_batch.extend_seq_lens, sum(counts), max(counts))
    tokens = getattr(forward_batch, "extend_num_tokens", None)
    if tokens is None:
        tokens = int(forward_batch.extend_seq_lens.sum())
    return Step(rows, forward_batch.seq_lens, forward_batch.extend_seq_lens, int(tokens), int(tokens))


def _draft_extend_tokens(forward_batch: Any) -> int:
    """New tokens of each request where a draft model takes in what was verified; 0: not as many of each."""
    width = getattr(forward_batch.spec_info, "num_tokens_per_req", 0)
    lens = getattr(forward_batch, "extend_seq_lens_cpu", None)
    return width if lens is None or all(int(n) == width for n in lens) else 0


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
