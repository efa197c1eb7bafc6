"""Where SGLang decides by the name of a backend: what it is told about ours, through its own hooks.

Its lists name the backends that its authors have tried. For the models and modes below ours does what the listed one
does, so SGLang's checks are made for that one, and its other decisions for ours.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flashcore_sglang.plugin import NAME

DRAFT_BACKEND = "fa3"
"""Serves the attention of draft models where ours does not."""

STEPS_MAKER = "_create_fa3_decode_backend"
"""Of SGLang's factory: makes the backend of a draft model's steps. The other one makes that of its extends."""

LISTED = {
    "GptOssForCausalLM": "fa3",
    "Llama4ForConditionalGeneration": "fa3",
    "Llama4ForCausalLM": "fa3",
    "Gemma4ForConditionalGeneration": "triton",
    "Gemma4ForCausalLM": "triton",
    "Gemma4UnifiedForConditionalGeneration": "triton",
    "Exaone4ForCausalLM": "fa3",
    "ExaoneMoEForCausalLM": "fa3",
    "ExaoneMoeForCausalLM": "fa3",
}
"""A backend of SGLang's list for each model architecture that has one and that ours serves."""

_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
logger = logging.getLogger("flashcore_sglang")


def install() -> None:
    """Registers the hooks. Called once in each of SGLang's processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import (
        DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    if NAME not in DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        add_deterministic_attention_backend_choices([NAME])
    if NAME not in RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND:
        add_radix_supported_deterministic_attention_backend_choices([NAME])
    HookRegistry.register(
        "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend", create_draft_backend, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.arg_groups.speculative_hook._handle_eagle_family", adjust_for_drafts, HookType.AROUND
    )
    _wrap_model_adjustments(adjust_for_model)


def create_draft_backend(
    original: Callable[..., Any], factory: Any, name: str, backend_map: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The attention of a draft model: ours, or ``DRAFT_BACKEND`` for what ours does not serve."""
    if NAME not in backend_map and DRAFT_BACKEND in backend_map:
        delegate = backend_map[DRAFT_BACKEND]
        stamped = "stamps_children" in inspect.signature(original).parameters  # 0.5.23: makers say what they made

        def make() -> Any:
            from flashcore_sglang import draft_backend

            _tell_context_length()
            steps = delegate.__name__ == STEPS_MAKER
            if delegates(factory.draft_model_runner, "steps" if steps else "extends"):
                return delegate()
            if not steps:
                _hook_captures()
            made = draft_backend.make_multi_step(factory) if steps else draft_backend.make_extend(factory)
            return (NAME, made) if stamped else made

        backend_map = {**backend_map, NAME: make}
    return original(factory, name, backend_map, *args, **kwargs)


def delegates(draft_model_runner: Any, part: str) -> bool:
    """Whether ``DRAFT_BACKEND`` is to serve a part of a draft model; the log says why."""
    from flashcore_sglang.draft_backend import reasons_to_delegate

    reasons = reasons_to_delegate(draft_model_runner, part)
    if reasons:
        logger.warning("%s: %s serves the %s of the draft model: %s", NAME, DRAFT_BACKEND, part, "; ".join(reasons))
    return bool(reasons)


def capture_draft_graphs(original: Callable[[Any], None], worker: Any) -> None:
    """SGLang's graphs of a draft model; its list of backends whose extends are captured has ours, too."""
    from sglang.srt.speculative import eagle_worker_v2

    from flashcore_sglang.backend import FlashCoreSparseBackend

    listed = eagle_worker_v2.TritonAttnBackend
    eagle_worker_v2.TritonAttnBackend = (listed, FlashCoreSparseBackend)  # for `isinstance`
    try:
        original(worker)
    finally:
        eagle_worker_v2.TritonAttnBackend = listed


@functools.cache
def _hook_captures() -> None:
    """Not by ``install``: only where there is a draft model has SGLang imported its worker."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._capture_cuda_graphs"
    HookRegistry.register(target, capture_draft_graphs, HookType.AROUND)
    HookRegistry.apply_hooks()


class _ContextLength:
    """Of the decode backend, where the instance has none of its own."""

    def __get__(self, hybrid: Any, owner: type) -> Any:
        return self if hybrid is None else hybrid.decode_backend.max_context_len


def _tell_context_length() -> None:
    """SGLang's EAGLE asks the verifying model's backend for it where trees of drafts have no buffer. In 0.5.16
    what stands before one backend for prefill and another for decode has none."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    if not hasattr(HybridAttnBackend, "max_context_len"):
        HybridAttnBackend.max_context_len = _ContextLength()


def adjust_for_model(server_args: Any, step: Callable[[Any], None]) -> None:
    """SGLang's adjustments for a model; its list of backends is asked for the listed one that does what ours does."""
    listed = LISTED.get(_architecture(server_args))
    if listed is None:
        step(server_args)
        return
    with _named(server_args, listed):
        step(server_args)


def adjust_for_drafts(original: Callable[[Any], None], server_args: Any) -> None:
    """SGLang's adjustments for EAGLE; it lists who drafts trees on pages of several tokens."""
    with _named(server_args, DRAFT_BACKEND):
        original(server_args)


def _architecture(server_args: Any) -> str:
    try:
        try:
            from sglang.srt.arg_groups.model_override_base import model_config_of
        except ImportError:  # 0.5.16
            return server_args.get_model_config().hf_config.architectures[0]
        return model_config_of(server_args).hf_config.architectures[0]
    except Exception:  # SGLang's own step says what is wrong with the model
        return ""


@contextmanager
def _named(server_args: Any, other: str) -> Iterator[None]:
    """Shows another backend's name in place of ours. 0.5.23 keeps decisions apart from what the operator gave."""
    ours = {field: other for field in _FIELDS if getattr(server_args, field) == NAME}
    if not ours:
        yield
        return
    try:
        from sglang.srt.arg_groups.overrides import declare_resolution
    except ImportError:
        for field, name in ours.items():
            setattr(server_args, field, name)
        try:
            yield
        finally:
            for field in ours:
                setattr(server_args, field, NAME)
        return
    declare_resolution(server_args, NAME, **ours)
    try:
        yield
    finally:
        declare_resolution(server_args, NAME, **dict.fromkeys(ours, NAME))


def _wrap_model_adjustments(adjust: Callable[[Any, Callable[[Any], None]], None]) -> None:
    try:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    except ImportError:  # 0.5.16
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        def around(original: Callable[[Any], None], server_args: Any) -> None:
            adjust(server_args, original)

        target = "sglang.srt.server_args.ServerArgs._handle_model_specific_adjustments"
        HookRegistry.register(target, around, HookType.AROUND)
        return
    register_resolution_hook("handle_model_specific_adjustments")(adjust)
