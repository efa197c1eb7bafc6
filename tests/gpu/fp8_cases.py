"""e4m3 caches for the GPU tests, with NaN where no request reads, and how close to float64 results on them are."""

from __future__ import annotations

import torch

E4M3, NAN_BYTE = torch.float8_e4m3fn, 0x7F


def e4m3_pools(
    owned: torch.Tensor, kv_heads: int, head_dim: int, seed: int = 1, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """[slots, G, D] K and V of normal and subnormal e4m3 values; NaN in the slots that are not ``owned``."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (owned.numel(), kv_heads, head_dim)
    pools = []
    for _ in range(2):
        x = torch.randn(shape, device=device, generator=generator).to(E4M3).view(torch.uint8)
        x[::7, :, ::3] &= 0x87  # subnormal
        x[~owned.to(device)] = NAN_BYTE
        pools.append(x.view(E4M3))
    return pools[0], pools[1]


def assert_close_to(want: torch.Tensor, out: torch.Tensor, products: torch.dtype = torch.float16) -> None:
    """The stated bound: rounding the exact result to out's dtype, and the same of probabilities in that of products."""
    assert torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} elements are not finite"
    error, size = (out.double() - want).norm(), want.norm()
    rounding = (want.to(out.dtype).double() - want).norm()
    probabilities = {torch.float16: 5e-4, torch.bfloat16: 2e-3}[products]
    assert error <= 1.1 * rounding + probabilities * size, (
        f"error {error / size:.2e}, of rounding {rounding / size:.2e}"
    )
