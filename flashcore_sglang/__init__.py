"""Attention for LLM serving that loads every KV page once: SGLang's attention backend ``flashcore_sparse``.

The pager's public API: ``build_layout``, ``build_layout_from_slots``, ``CsrPager``, ``CsrLayout``, ``CostModel``.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CostModel": "config",
    "CsrLayout": "layout",
    "CsrPager": "layout",
    "build_layout": "layout",
    "build_layout_from_slots": "layout",
}
__all__ = ["CostModel", "CsrLayout", "CsrPager", "build_layout", "build_layout_from_slots"]


def __getattr__(name: str) -> Any:
    # On first use: the doctor must run where torch is missing.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
