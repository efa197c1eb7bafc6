"""Registration with SGLang: the entry point of group ``sglang.srt.plugins``, called in each of its processes.

SGLang logs and swallows what a plug-in raises, and the user then reads "invalid choice". So the name is registered
before anything can fail, and what fails is raised by the factory, where it stops the server with its reason.
"""

from __future__ import annotations

import os
from typing import Any

NAME = "flashcore_sparse"


def register() -> None:
    """Adds ``flashcore_sparse`` to SGLang's attention backends. Calling it again changes nothing."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    from flashcore_sglang import sglang_hooks

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(create_backend)
        _route_cpu_helpers()
        sglang_hooks.install()


def create_backend(model_runner: Any) -> Any:
    """The factory in SGLang's registry. Raises one ValueError with every reason not to serve.

    A draft model that ours does not serve gets another backend: the drafts are verified here all the same.
    """
    from flashcore_sglang import sglang_hooks
    from flashcore_sglang.backend import FlashCoreSparseBackend

    if getattr(model_runner, "is_draft_worker", False) and sglang_hooks.delegates(model_runner, "rest"):
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        return ATTENTION_BACKENDS[sglang_hooks.DRAFT_BACKEND](model_runner)
    return FlashCoreSparseBackend(model_runner)


def triton_runs() -> bool:
    """Whether SGLang's Triton helpers can run: on a GPU, or interpreted."""
    import torch

    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def _route_cpu_helpers() -> None:
    """Lets SGLang write its tables in PyTorch on a CPU, as it does for torch_native; it takes Triton for names it does
    not know (`support_triton`)."""
    if triton_runs():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def support_triton(original: Any, backend: str) -> bool:
        return backend != NAME and bool(original(backend))

    HookRegistry.register("sglang.srt.utils.common.support_triton", support_triton, HookType.AROUND)
