"""Decode on a Hopper GPU: snapshot -> pager -> schedule -> attention -> merge, all in device memory.

``snapshot`` is launched outside the CUDA graph and is the only reader of SGLang's tables; ``plan`` and ``attend`` are
captured. Every buffer is allocated by the constructor and never moves, so graphs of several batch sizes share them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from flashcore_sglang import build
from flashcore_sglang.config import schedule_costs
from flashcore_sglang.device_pager import MAX_ROWS, DevicePager
from flashcore_sglang.device_window import DeviceWindow

Scale: TypeAlias = torch.Tensor | float | None
"""What the values of an e4m3 cache are to be multiplied with: a number, float32 of [1] or [G], None: 1."""


def scale_arguments(
    scale: float, k_scale: Scale, v_scale: Scale, logit_cap: float, sinks: torch.Tensor | None
) -> list[Any]:
    """The last arguments of the library's attention: numbers are folded, tensors are left to the kernel."""
    tensors = [x.detach().reshape(-1) if isinstance(x, torch.Tensor) else None for x in (k_scale, v_scale)]
    k, v = (1.0 if x is None or isinstance(x, torch.Tensor) else float(x) for x in (k_scale, v_scale))
    return [scale * k, logit_cap, sinks, *tensors, v]


def partial_capacity(max_rows: int) -> int:
    """Partial results there is room for: one for each row of each piece of a segment."""
    return 4096 + 8 * max_rows


class GpuDecode:
    """Attention of one query token per request over its paged KV cache; defined by ``reference.extend``.

    Args:
        page_size, num_pages: of the KV pool.
        max_rows:   the largest batch, padding included.
        max_tokens: the longest request.
        heads, kv_heads, head_dim: of the model's attention on this GPU.
        kv_dtype:   of the KV cache; what a tile costs depends on it.
        sharing:    False: every request reads its own pages.
        deterministic: a request's result does not depend on the batch: no sharing, and its tokens are not split.
        pager:      of the same pool and sizes, to use one for several shapes of heads, or a window's; None: its own.
        device:     a Hopper GPU.

    Raises ValueError for sizes that are not served, RuntimeError if the library cannot be compiled.
    """

    def __init__(
        self,
        *,
        page_size: int,
        num_pages: int,
        max_rows: int,
        max_tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kv_dtype: torch.dtype = torch.bfloat16,
        sharing: bool = True,
        deterministic: bool = False,
        pager: DevicePager | DeviceWindow | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        if not 1 <= max_rows <= MAX_ROWS:
            raise ValueError(f"max_rows: want 1 .. {MAX_ROWS}, got {max_rows}")
        self.page_size, self.max_rows = page_size, max_rows
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._library = build.library("cuda")
        # A request that is read in one piece needs no slot; the schedule splits none where there is no room to.
        self._partials = 1 if deterministic else partial_capacity(max_rows)
        self.pager: DevicePager | DeviceWindow = pager or DevicePager(
            page_size,
            max_rows=max_rows,
            max_tokens=max_tokens,
            num_pages=num_pages,
            sharing=sharing and not deterministic,
            max_entries=max(self._partials, max_rows),
            device=device,
        )
        self._layout = self.pager.layout(max_rows)
        self._segments = self._layout.segment_rows.shape[0]
        self._costs = schedule_costs("hopper", kv_dtype)
        size = self._library.decode_workspace_bytes(max_rows, self._segments, heads, kv_heads, head_dim, self._partials)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)

    @property
    def num_tokens(self) -> int:
        """Queries of the planned batch: one for each request."""
        return self._layout.row_order.numel()

    @property
    def mebibytes(self) -> float:
        """Device memory of all buffers."""
        return self.pager.mebibytes + self.workspace_mebibytes

    @property
    def workspace_mebibytes(self) -> float:
        """Device memory of the workspace; the pager's is its own."""
        return self._workspace.numel() / 2**20

    def snapshot(self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Copies what the batch reads; arguments as for ``DevicePager.snapshot``. Not for capture."""
        self.pager.snapshot(req_to_token, req_pool_indices, seq_lens)
        self.use(req_pool_indices.numel())

    def use(self, num_rows: int) -> None:
        """Takes the pager's snapshot of ``num_rows`` rows, which another has made."""
        self._layout = self.pager.layout(num_rows)

    def plan(self) -> None:
        """Segments and work list of the last snapshot's batch, once for all layers. Capturable."""
        x = self._layout
        self.pager.build()
        self._library.decode_schedule(
            x.sizes, x.row_order, x.segment_rows, x.segment_positions, x.segment_entries, x.table, self._workspace,
            self.page_size, self._heads, self._kv_heads, self._head_dim, self._partials, *self._costs,
        )  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        logit_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
    ) -> torch.Tensor:
        """Attention of the planned batch, into ``out``. Capturable.

        Args:
            q:       [B, H, D] bf16 or fp16, heads and dims contiguous.
            k_cache, v_cache: [slots, G, D], token-major, in q's dtype or float8_e4m3fn.
            out:     [B, H, D], written and returned. A request of length 0 gives zeros.
            k_scale, v_scale: of a float8_e4m3fn cache: the values are the cached ones times a number, or times a
                     float32 tensor of [1] or [G], which is read on the GPU, also in a replay; None: 1.
            scale:   multiplies q.k. logit_cap: 0 is none. sinks: [H] float32, the logit of a key without a value.

        Raises ValueError for shapes, dtypes or devices that do not fit.
        """
        x = self._layout
        if q.shape[0] != self.num_tokens:
            raise ValueError(f"q: want {self.num_tokens} rows, one for each planned request, got {q.shape[0]}")
        self._library.decode(
            q, k_cache, v_cache, x.table, self._workspace, out, self._segments, self._partials, self.page_size,
            *scale_arguments(scale, k_scale, v_scale, logit_cap, sinks),
        )  # fmt: skip
        return out
