"""Stand-in for SGLang's CPU kernels: every name can be imported, and raises when called.

With ``SGLANG_USE_CPU_ENGINE=1`` SGLang imports about ten functions from here at start. It uses its arithmetic kernels
only where ``torch.ops.sgl_kernel`` has them, which it has not, so every layer takes its PyTorch path.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: not available when serving on the CPU")

    missing.__name__ = name
    return missing


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, starts, ends, out_cache_loc, pool_len):  # type: ignore[no-untyped-def]
    """Write the new slots of each request into its row: ``req_to_token[row, start:end] = next end - start slots``."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start
