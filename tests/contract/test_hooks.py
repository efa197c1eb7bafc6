"""What SGLang makes of our name where it has lists of backends: models, drafts, deterministic inference."""

from __future__ import annotations

import needs
import pytest

needs.sglang()

from shapes import write_model

from flashcore_sglang import sglang_hooks
from flashcore_sglang.plugin import NAME, register

pytestmark = pytest.mark.contract


@pytest.fixture
def resolved(tmp_path):
    """Server arguments as SGLang resolves them for a model."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()

    def resolve(shape: str, attention_backend: str = NAME, **arguments):
        model = write_model(tmp_path / shape, shape)
        args = ServerArgs(
            model_path=model,
            device="cpu",
            skip_tokenizer_init=True,
            attention_backend=attention_backend,
            **arguments,
        )
        if hasattr(args, "resolve_once"):  # 0.5.23
            args.resolve_once()
        return view_of(args)

    return resolve


def view_of(server_args):
    """The arguments with what SGLang has decided about them."""
    try:
        from sglang.srt.arg_groups.model_override_base import resolved_view
    except ImportError:
        from sglang.srt.arg_groups.overrides import resolved_view
    return resolved_view(server_args)


@pytest.mark.parametrize("shape", ["llama", "gpt-oss", "gemma2", "gemma3", "exaone4"])
def test_model_with_a_list_of_backends_starts_with_ours(resolved, shape):
    assert resolved(shape).attention_backend == NAME


def test_deterministic_inference_keeps_the_radix_cache(resolved):
    args = resolved("llama", enable_deterministic_inference=True)
    assert args.attention_backend == NAME
    assert not args.disable_radix_cache


def test_other_backend_is_still_refused_for_a_model_with_a_list(resolved):
    with pytest.raises(AssertionError, match="GptOssForCausalLM requires one of"):
        resolved("gpt-oss", "torch_native")


def test_hooked_functions_exist():
    import importlib
    import inspect

    register()
    utils = importlib.import_module("sglang.srt.speculative.draft_utils")
    names = list(inspect.signature(utils.DraftBackendFactory._create_backend).parameters)
    assert names[1:3] == ["backend_name", "backend_map"] or names == ["args", "kwargs"]  # hooked already
    assert hasattr(utils.DraftBackendFactory, sglang_hooks.STEPS_MAKER)
    worker = importlib.import_module("sglang.srt.speculative.eagle_worker_v2")
    assert isinstance(worker.TritonAttnBackend, type) and hasattr(worker.EagleDraftWorker, "_capture_cuda_graphs")
    assert hasattr(importlib.import_module("sglang.srt.arg_groups.speculative_hook"), "_handle_eagle_family")
