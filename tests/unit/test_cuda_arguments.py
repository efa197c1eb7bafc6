"""The CUDA library names the argument that does not fit, before anything runs on a GPU: so here, with CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashcore_sglang import build

try:
    build.nvcc()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

Q, KV = torch.zeros(2, 32, 128, dtype=torch.bfloat16), torch.zeros(64, 8, 128, dtype=torch.bfloat16)
INTS, BYTES = torch.zeros(64, dtype=torch.int32), torch.zeros(1 << 20, dtype=torch.uint8)
DECODE = {
    "q": Q, "k_cache": KV, "v_cache": KV, "page_indices": INTS, "workspace": BYTES, "out": Q.clone(),
    "segment_capacity": 4, "partial_capacity": 16, "page_size": 1, "scale": 0.1, "logit_cap": 0.0, "sinks": None,
    "k_scale": None, "v_scale": None, "v_factor": 1.0,
}  # fmt: skip
EXTEND = {
    "q": Q, "k_cache": KV, "v_cache": KV, "table": INTS, "workspace": BYTES, "out": Q.clone(), "page_size": 1,
    "max_rows": 4, "max_tokens": 64, "partial_capacity": 16, "windowed": 0, "scale": 0.1, "logit_cap": 0.0,
    "sinks": None, "k_scale": None, "v_scale": None, "v_factor": 1.0, "custom_mask": None, "gathered": None,
}  # fmt: skip
NOT_FITTING = [
    ({"q": Q.float()}, "q: want bfloat16 or float16, got 32-bit"),
    ({"q": Q[0]}, r"q: want \[T, H, D\]"),
    ({"k_cache": KV[:, :, :64]}, r"k_cache: want \[slots, G, 128\]"),
    ({"v_cache": KV[:-1]}, "v_cache: want shape and strides of k_cache"),
    ({"k_cache": KV.half(), "v_cache": KV.half()}, "want the dtype of q"),
    ({"out": Q[:1]}, r"out: want \[2, 32, 128\]"),
    ({}, "q: want a CUDA tensor"),
]


@pytest.mark.parametrize("change, message", NOT_FITTING)
@pytest.mark.parametrize("name, arguments", [("decode", DECODE), ("extend", EXTEND)])
def test_the_argument_is_named(name: str, arguments: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(build.library("cuda"), name)(*(arguments | change).values())


DECODE_SIZES = {"batch": 4, "segment_capacity": 8, "heads": 32, "kv_heads": 8, "head_dim": 128, "partial_capacity": 64}
EXTEND_SIZES = {
    "max_rows": 4, "max_tokens": 64, "heads": 32, "kv_heads": 8, "head_dim": 128, "partial_capacity": 16, "e4m3": 0,
}  # fmt: skip


@pytest.mark.parametrize("name, sizes", [("decode", DECODE_SIZES), ("extend", EXTEND_SIZES)])
def test_sizes_that_are_served_have_a_workspace(name: str, sizes: dict[str, int]) -> None:
    assert getattr(build.library("cuda"), f"{name}_workspace_bytes")(*sizes.values()) > 0


@pytest.mark.parametrize(
    "name, sizes, change, message",
    [
        ("decode", DECODE_SIZES, {"heads": 30}, "heads: want a multiple of kv_heads"),
        ("decode", DECODE_SIZES, {"head_dim": 96}, "head_dim: want 64, 128 or 256, got 96"),
        ("decode", DECODE_SIZES, {"partial_capacity": 0}, r"partial_capacity: want 1 \.\. 2\^24 - 1, got 0"),
        ("decode", DECODE_SIZES, {"batch": 0}, "batch: want 1"),
        ("extend", EXTEND_SIZES, {"heads": 30}, "heads: want a multiple of kv_heads"),
        ("extend", EXTEND_SIZES, {"head_dim": 96}, "head_dim: want 64, 128 or 256, got 96"),
        ("extend", EXTEND_SIZES, {"max_rows": 0}, "max_rows: want 1"),
        ("extend", EXTEND_SIZES, {"max_tokens": 0}, "max_tokens: want 1"),
        # The bounds within which a q_row's token is found by a multiplication.
        ("extend", EXTEND_SIZES, {"max_tokens": (1 << 20) + 1}, r"max_tokens: want 1 \.\. 1048576, got 1048577"),
        ("extend", EXTEND_SIZES, {"heads": 65, "kv_heads": 1}, "heads: want a multiple of kv_heads, at most 64 times"),
    ],
)
def test_sizes_that_are_not_served_are_named(
    name: str, sizes: dict[str, int], change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(build.library("cuda"), f"{name}_workspace_bytes")(*(sizes | change).values())
