"""The attention of draft models: the steps that write drafts, and what SGLang's factory of such backends is given.

A draft model also takes in prompts and what was verified. Those are new tokens over a cached prefix, which
``FlashCoreSparseBackend`` serves as ever.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from flashcore_sglang.backend import FlashCoreSparseBackend
from flashcore_sglang.facts import facts_of
from flashcore_sglang.plugin import NAME
from flashcore_sglang.requirements import draft_refusals, refusals
from flashcore_sglang.step import Drafts

logger = logging.getLogger("flashcore_sglang")


class MultiStepDraftBackend:
    """What SGLang drives as ``draft_attn_backend``: one backend for each step that the draft model runs.

    Args:
        backend:  of the draft model. The steps share its buffers, as they run one after the other.
        branches: of the drafts of each request (``--speculative-eagle-topk``).
        steps:    slots of a branch (``--speculative-num-steps``); the model runs once less.
    """

    needs_cpu_seq_lens = False

    def __init__(self, backend: FlashCoreSparseBackend, branches: int, steps: int) -> None:
        self._backend, self._branches, self._steps = backend, branches, steps
        self.attn_backends = [copy.copy(backend) for _ in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plans a round of steps outside of CUDA graphs."""
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plans a round from a private snapshot of the rows of ``req_to_token`` that it reads."""
        size = forward_batch.batch_size
        rows, seq_lens = forward_batch.req_pool_indices[:size], forward_batch.seq_lens[:size]
        plans = self._backend.plan_drafts(Drafts(rows, seq_lens, self._branches, self._steps))
        for backend, plan in zip(self.attn_backends, plans, strict=True):
            backend.forward_metadata = plan

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The first step's work lists, from the snapshot alone; the others follow with their first layer."""
        self.attn_backends[0].init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: the buffers are those of the draft model's backend."""


def reasons_to_delegate(model_runner: Any, part: str) -> list[str]:
    """Why ours does not serve a part of this draft model ("steps", "extends" or "rest"); empty if it does."""
    facts = facts_of(model_runner)
    reasons = refusals(facts) + draft_refusals(facts)
    if part == "extends" and not facts.serves_prefill:
        reasons.append("draft model: want all new tokens here, got another backend for prompts")
    return reasons


def make_multi_step(factory: Any) -> MultiStepDraftBackend:
    """For ``DraftBackendFactory.create_decode_backend``."""
    backend = _backend_of(factory)
    logger.warning("%s serves the steps of the draft model", NAME)
    return MultiStepDraftBackend(backend, factory.topk, factory.speculative_num_steps)


def make_extend(factory: Any) -> FlashCoreSparseBackend:
    """For ``DraftBackendFactory.create_draft_extend_backend``."""
    backend = _backend_of(factory)
    logger.warning("%s serves the extends of the draft model", NAME)
    return backend


def _backend_of(factory: Any) -> FlashCoreSparseBackend:
    """The draft model's own, if it is ours and for the same drafts; else one for both that the factory is asked for: a
    draft model's steps and extends follow each other."""
    facts = facts_of(factory.draft_model_runner)
    backend = getattr(factory.draft_model_runner, "attn_backend", None)
    made = getattr(factory, "flashcore_backend", None)
    for own in (backend, getattr(backend, "decode_backend", None), made):  # the second: beside another for prefill
        if isinstance(own, FlashCoreSparseBackend) and own.facts == facts:
            return own
    factory.flashcore_backend = FlashCoreSparseBackend(factory.draft_model_runner)
    return factory.flashcore_backend
