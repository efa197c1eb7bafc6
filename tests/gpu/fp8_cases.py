"""e4m3 caches for the GPU tests: pools with NaN where no request reads, and their values in float64."""

from __future__ import annotations

import torch
from gpu.decode_cases import exact

E4M3, NAN_BYTE = torch.float8_e4m3fn, 0x7F


def e4m3_pools(owned: torch.Tensor, kv_heads: int, head_dim: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """[slots, G, D] K and V of normal and subnormal e4m3 values; NaN in the slots that are not ``owned``."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (owned.numel(), kv_heads, head_dim)
    pools = []
    for _ in range(2):
        x = torch.randn(shape, device="cuda", generator=generator).to(E4M3).view(torch.uint8)
        x[::7, :, ::3] &= 0x87  # subnormal
        x[~owned.cuda()] = NAN_BYTE
        pools.append(x.view(E4M3))
    return pools[0], pools[1]


def values(pool: torch.Tensor, scale: float | torch.Tensor | None) -> torch.Tensor:
    """What an e4m3 pool stands for, float64."""
    if isinstance(scale, torch.Tensor):
        scale = scale.double().view(1, -1, 1)
    return pool.double() * (1.0 if scale is None else scale)


def assert_close_to(want: torch.Tensor, out: torch.Tensor) -> None:
    """The stated bound: rounding the exact result to out's dtype, and 5e-4 for probabilities in fp16 (2e-3 in bf16)."""
    assert torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} elements are not finite"
    error, size = (out.double() - want).norm(), want.norm()
    rounding = (want.to(out.dtype).double() - want).norm()
    assert error <= 1.1 * rounding + 5e-4 * size, f"error {error / size:.2e}, of rounding {rounding / size:.2e}"


__all__ = ["E4M3", "NAN_BYTE", "assert_close_to", "e4m3_pools", "exact", "values"]
