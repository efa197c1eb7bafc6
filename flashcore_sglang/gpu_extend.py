"""Extend on a Hopper GPU: new tokens of each request over its cached prefix; prefill, chunks, mixed batches, verify.

A step is snapshot -> pager -> schedule, once for all layers, then one launch per layer. Nothing is read on the host;
nothing is allocated unless a step has more tokens than any before.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from flashcore_sglang import build
from flashcore_sglang.config import GatherModel, gather_model
from flashcore_sglang.device_pager import DeviceLayout, DevicePager
from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.gpu_decode import Scale, scale_arguments

PARTIAL_CAPACITY = 512
"""Chunks of tiles, cut as there are few of them or a few are left over; each is a tile's rows of D floats."""
MAX_TOKENS = 1 << 20
"""Query tokens of a step: kMaxTokens of csrc/api_extend.cc."""
MAX_GATHER_SLOTS = 1 << 20
"""kMaxGatherSlots of csrc/attention/extend_params.h."""


class Visible(IntEnum):
    """Which positions of its row a new token sees."""

    CAUSAL = 0
    """Those up to its own."""
    ALL = 1
    """All: encoder layers."""
    MASKED = 2
    """The cached prefix, and of the new tokens those that the custom mask has: a tree of drafts."""


class GpuExtend:
    """Attention of several query tokens per request over its paged KV cache; defined by ``reference.extend``.

    Args:
        pager:      of the same KV pool; decode's may be used, as steps follow each other. Page sizes are powers of two.
                    Of a window: positions, and ``plan``'s lengths, are those that it counts.
        heads, kv_heads, head_dim: of the model's attention on this GPU.
        max_tokens: query tokens that there is room for at first; a larger step allocates more, which those that are
                    captured must not.
        kv_dtype:   of the KV cache: bfloat16 or float16, which q then has too, or float8_e4m3fn.
        deterministic: a token's result does not depend on the batch or on how its request was cut into chunks, if the
                    pager shares nothing: tiles are not cut.
        device:     a Hopper GPU.
        gather:     when scattered K and V are copied to consecutive slots first, and those of a float8_e4m3fn cache
                    converted; None: as configs/gather.json says.
        gathered:   where they are copied to, of another with the same KV heads and head dim, as steps follow each
                    other; None: its own.

    Raises ValueError for sizes that are not served, RuntimeError if the library cannot be compiled.
    """

    def __init__(
        self,
        pager: DevicePager | DeviceWindow,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int = 8192,
        kv_dtype: torch.dtype = torch.bfloat16,
        deterministic: bool = False,
        device: torch.device | str = "cuda",
        gather: GatherModel | None = None,
        gathered: torch.Tensor | None = None,
    ) -> None:
        self.pager, self.max_rows = pager, pager.max_rows
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._library = build.library("cuda")
        self._layout: DeviceLayout = pager.layout(1)
        self._num_tokens, self._windowed = 0, False
        self._device, self._page_size = device, pager.page_size
        self._kv_dtype, self._deterministic = kv_dtype, deterministic
        self._partials = 0 if deterministic else PARTIAL_CAPACITY
        self._gather = gather or gather_model("hopper")
        self._owns_gathered, self._gathers = gathered is None, False
        self._gathered = self._make_gathered() if gathered is None else gathered
        self._max_tokens, self._workspace = max_tokens, self._make_workspace(max_tokens)

    def _make_gathered(self) -> torch.Tensor:
        """[2, slots, G, bytes of D elements of q's dtype]: copies of K and V."""
        row_bytes = self._head_dim * 2
        slots = (self._gather.mebibytes << 20) // (2 * self._kv_heads * row_bytes)
        # Converting changes the rounding, and whether it pays depends on the batch.
        used = not self._deterministic if self._e4m3 else self._page_size <= self._gather.max_page_size
        shape = (2, min(slots, MAX_GATHER_SLOTS) if used else 0, self._kv_heads, row_bytes)
        return torch.empty(shape, dtype=torch.uint8, device=self._device)

    def _make_workspace(self, max_tokens: int) -> torch.Tensor:
        size = self._library.extend_workspace_bytes(
            self.max_rows, max_tokens, self._heads, self._kv_heads, self._head_dim, self._partials, self._e4m3
        )
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    @property
    def _e4m3(self) -> int:
        return int(self._kv_dtype == torch.float8_e4m3fn)

    @property
    def num_tokens(self) -> int:
        """Queries of the planned batch."""
        return self._num_tokens

    @property
    def mebibytes(self) -> float:
        """Device memory of the workspace and of gathered K and V; what is of another or of the pager is not counted."""
        return (self._workspace.numel() + (self._gathered.numel() if self._owns_gathered else 0)) / 2**20

    @property
    def gathered(self) -> torch.Tensor:
        """Room for gathered K and V, for another ``GpuExtend``."""
        return self._gathered

    def snapshot(self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Copies what the batch reads; arguments as for ``DevicePager.snapshot``. ``seq_lens`` count the new tokens."""
        self.pager.snapshot(req_to_token, req_pool_indices, seq_lens)
        self.use(req_pool_indices.numel())

    def use(self, num_rows: int) -> None:
        """Takes the pager's snapshot of ``num_rows`` rows, which another has made."""
        self._layout = self.pager.layout(num_rows)

    def plan(
        self,
        seq_lens: torch.Tensor,
        q_lens: torch.Tensor,
        num_tokens: int,
        *,
        visible: Visible = Visible.CAUSAL,
        window_left: int = -1,
    ) -> None:
        """Segments and work list of the last snapshot's batch, once for all layers.

        Args:
            seq_lens:    [B] int32 or int64, as for ``snapshot``: the new tokens are the last of them.
            q_lens:      [B] int32 or int64, new tokens of each request; 0 allowed.
            num_tokens:  their sum.
            window_left: positions that a token sees before its own; -1: all. Causal only.

        Raises ValueError for shapes, dtypes or sizes that do not fit.
        """
        if num_tokens > self._max_tokens:
            # A step of before may still read the old one.
            self._workspace.record_stream(torch.cuda.current_stream(self._workspace.device))
            self._max_tokens = max(num_tokens, min(2 * self._max_tokens, MAX_TOKENS))
            self._workspace = self._make_workspace(self._max_tokens)
        self._num_tokens, self._windowed = num_tokens, window_left >= 0
        q_rows = num_tokens * (self._heads // self._kv_heads)
        wanted = self._gather.rows_converted if self._e4m3 else self._gather.rows_scattered
        self._gathers = self._gathered.numel() > 0 and q_rows >= wanted and not self._windowed
        self.pager.build()
        x = self._layout
        self._library.extend_schedule(
            x.sizes, x.row_order, x.segment_rows, x.segment_positions, x.segment_entries, x.row_indptr, x.row_segments,
            seq_lens, q_lens, self._workspace, num_tokens, self.pager.table_stride, x.page_size, self.max_rows,
            self._max_tokens, self._heads, self._kv_heads, self._head_dim, self._partials, int(visible), window_left,
            x.table, self._gathered.shape[1] if self._gathers else 0, self._gather.rows_scattered,
            self._gather.rows_boxed, self._gather.rows_converted, self._e4m3, self.pager.row_entries,
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
        custom_mask: torch.Tensor | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
    ) -> torch.Tensor:
        """Attention of the planned batch, into ``out``.

        Args:
            q:       [T, H, D] bf16 or fp16, request after request, heads and dims contiguous.
            k_cache: [slots, G, D] of ``kv_dtype``, token-major; holds the new tokens too. v_cache: like it.
            k_scale, v_scale: of a float8_e4m3fn cache, as for ``GpuDecode.attend``.
            out:     [T, H, D], written and returned. A token that sees nothing gets zeros.
            scale:   multiplies q.k. logit_cap: 0 is none. sinks: [H] float32, the logit of a key without a value.
            custom_mask: of ``Visible.MASKED``: [sum of q_lens * seq_lens] bool or uint8, for each request its new
                     tokens by its positions; True is seen. It must be True over the cached prefix.

        Raises ValueError for shapes, dtypes or devices that do not fit.
        """
        if q.shape[0] != self._num_tokens:
            raise ValueError(f"q: want {self._num_tokens} tokens, those of the plan, got {q.shape[0]}")
        self._library.extend(
            q, k_cache, v_cache, self._layout.table, self._workspace, out, self._layout.page_size, self.max_rows,
            self._max_tokens, self._partials, int(self._windowed),
            *scale_arguments(scale, k_scale, v_scale, logit_cap, sinks), custom_mask,
            self._gathered if self._gathers else None,
        )  # fmt: skip
        return out
