"""The last positions of each request in device memory: what layers read whose tokens do not see everything.

Where ``DevicePager`` keeps all of a request's pages, this keeps those that a sliding window or a chunk reaches,
translated where such layers have a pool of their own. Positions are counted from ``bases``, page boundaries at or
before the first position that is read: shifting a request's positions changes neither what is causal nor what a
window reaches. Every request reads its own pages. New tokens in several chunks are several rows, one for each chunk.

The tables are made by csrc/pager/window.h: on the GPU in one launch, on a CPU, where the tests look at them, in a loop.

It has the methods of ``DevicePager`` that ``GpuDecode`` and ``GpuExtend`` use, and takes its place there.
"""

from __future__ import annotations

import torch

from flashcore_sglang import build
from flashcore_sglang.device_pager import DeviceLayout
from flashcore_sglang.reach import Reach


class DeviceWindow:
    """Tables and segments of windows.

    Args:
        page_size:   tokens per page: a power of two up to 1024.
        reach:       of the layers; chunks are whole pages.
        max_rows:    the largest batch, padding included, as ``Reach.rows`` counts it: 1 to 1024.
        max_queries: new tokens of a request that steps have which are captured.
        max_tokens:  the longest request; longer ones are cut.
        num_pages:   pages of the pool that is read; ids outside are read as page 0.
        device:      of all tensors, CUDA or CPU.
        max_extend:  new tokens of a step that there is room for at first, however they are spread over its requests. A
                     step with more allocates more.

    Raises ValueError for sizes that are not served, RuntimeError if the library cannot be compiled.
    """

    def __init__(
        self,
        page_size: int,
        *,
        reach: Reach,
        max_rows: int,
        max_queries: int,
        max_tokens: int,
        num_pages: int,
        device: torch.device | str,
        max_extend: int = 0,
    ) -> None:
        if reach.everything or reach.chunk % page_size:
            raise ValueError(f"reach: want a window, or chunks of whole pages of {page_size} tokens, got {reach}")
        self.page_size, self.reach, self.max_rows, self.num_rows = page_size, reach, max_rows, 1
        self._max_tokens, self._max_queries, self._max_extend = max_tokens, max_queries, max_extend
        # With a page of queries in it, rows do not overlap wherever they begin: csrc/pager/window.h.
        self._stride = max(self._width(max_queries), self._width(page_size))
        self._step_stride = self._stride
        options = {
            "max_rows": max_rows,
            "page_size": page_size,
            "num_pages": min(num_pages, 2**31 - 1),
            "left": reach.left,
            "chunk": reach.chunk,
            "max_tokens": max_tokens,
            "stride": self._stride,
        }
        self._snapshot, self._cut_mask = build.library(torch.device(device).type).make_window(options)
        ints = {"dtype": torch.int32, "device": device}
        # One after the other as WindowFields has them, 256 bytes apart or a multiple.
        self._fields = torch.zeros(10, -(-(max_rows + 1) // 64) * 64, **ints)
        self._sizes, self._status = self._fields[0, :8], torch.zeros(4, **ints)
        self._segment_positions = self._fields[1:3].view(-1)[: 2 * max_rows].view(-1, 2)
        self._entries = self._fields[3, : max_rows + 1]
        self._lens, self._q_lens = self._fields[4:6, :max_rows].unbind()
        self._rows = torch.arange(max_rows + 1, **ints)
        self._segment_rows = torch.stack([self._rows[:-1], self._rows[1:]], dim=1).contiguous()
        self._table = self._step_table = self._make_table(max_extend)
        self._long_table, self._long_extend = self._table, max_extend
        self._mask = self._step_mask = torch.ones(0, dtype=torch.bool, device=device)
        self._step_queries = 1

    def _make_table(self, max_extend: int) -> torch.Tensor:
        entries = self.max_rows * self._stride + (0 if self.reach.chunk else max_extend // self.page_size)
        return torch.zeros(entries, dtype=torch.int32, device=self._fields.device)

    def make_mask(self, max_requests: int) -> None:
        """Room for the masks of trees of ``max_queries`` drafts, which then do not move."""
        rows = self.reach.rows(max_requests, max_requests * self._max_queries)
        self._mask = self._mask.new_ones(rows * self._max_queries * self._width(self._max_queries) * self.page_size)

    @property
    def mask(self) -> torch.Tensor:
        """The custom mask of the last snapshot, by positions as they are counted here."""
        return self._step_mask

    @property
    def mebibytes(self) -> float:
        """Device memory of all buffers but masks."""
        tables = {x.data_ptr(): x.numel() for x in (self._table, self._long_table)}
        return (sum(tables.values()) + self._fields.numel() + 3 * self.max_rows) * 4 / 2**20

    @property
    def table_stride(self) -> int:
        """The most entries of a row in ``DeviceLayout.table``, of the last snapshot."""
        return self._step_stride

    @property
    def row_entries(self) -> torch.Tensor:
        """[max_rows + 1] int32: where each row of the last snapshot begins in ``DeviceLayout.table``."""
        return self._entries

    @property
    def lens(self) -> torch.Tensor:
        """[num_rows] int32: lengths of the last snapshot's rows, counted from their bases."""
        return self._lens[: self.num_rows]

    @property
    def q_lens(self) -> torch.Tensor:
        """[num_rows] int32: new tokens of the last snapshot's rows."""
        return self._q_lens[: self.num_rows]

    def snapshot(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        q_lens: torch.Tensor | None = None,
        num_tokens: int = 0,
        max_queries: int = 1,
        slot_map: torch.Tensor | None = None,
    ) -> None:
        """Copies what the batch reads; nothing is read on the host. One launch. Not for capture.

        Args:
            req_to_token, req_pool_indices, seq_lens: as for ``DevicePager.snapshot``.
            q_lens:      [B] int32 or int64, the last tokens of each request that are queries; None: one each.
            num_tokens:  their sum, and max_queries: the most of them of one request, where ``q_lens`` is given; what
                         exceeds them is cut.
            slot_map:    [slots] int32 or int64, the slot of these layers' pool for each slot of the table; None: its
                         own.

        Raises ValueError for more rows than there is room for, and for a wrong shape, dtype or device. What the tables
        hold is never an error: ids outside their pool are read as page 0.
        """
        requests = req_pool_indices.numel()
        self.num_rows = requests if q_lens is None else self.reach.rows(requests, num_tokens)
        if not 1 <= self.num_rows <= self.max_rows:
            raise ValueError(f"req_pool_indices: want 1 .. {self.max_rows} rows, got {self.num_rows}")
        max_queries = self._step_queries = max(1, max_queries)
        width = self._width(max_queries)
        self._step_table = self._table if width <= self._stride else self._table_for(num_tokens)
        self._step_stride = max(width, self._stride)
        self._snapshot(
            self._fields, self._step_table, req_to_token, req_pool_indices, seq_lens, q_lens, slot_map, self.num_rows,
            num_tokens, max_queries, width,
        )  # fmt: skip

    def _table_for(self, num_tokens: int) -> torch.Tensor:
        """One with room for so many new tokens. What is captured reads the first, which does not move."""
        if num_tokens <= self._max_extend:
            return self._table
        if num_tokens > self._long_extend:
            if self._long_table.is_cuda:  # a step of before may still read the old one
                self._long_table.record_stream(torch.cuda.current_stream(self._long_table.device))
            self._long_extend = max(num_tokens, 2 * self._long_extend)
            self._long_table = self._make_table(self._long_extend)
        return self._long_table

    def take_mask(self, mask: torch.Tensor) -> None:
        """Cuts a custom mask to what the last snapshot's rows read: their queries by the positions from their base on.

        ``mask``: [sum of q_lens * seq_lens] bool or uint8, of the requests of the snapshot. One launch; allocates where
        ``make_mask`` has not.
        """
        size = self.num_rows * self._step_queries * self._width(self._step_queries) * self.page_size
        self._step_mask = self._mask if size <= self._mask.numel() else self._mask.new_ones(size)
        self._cut_mask(self._fields, mask, self._step_mask, self.num_rows)

    def build(self) -> None:
        """Nothing: ``snapshot`` has written all. Here because ``DevicePager`` has it."""

    def violation(self) -> None:
        """None: what is out of bounds is cut, and the pager of the full layers reports it."""

    def layout(self, num_rows: int) -> DeviceLayout:
        """One segment for each row, read by it alone; views of the last snapshot's buffers."""
        return DeviceLayout(
            page_size=self.page_size,
            sizes=self._sizes,
            status=self._status,
            row_order=self._rows[:num_rows],
            segment_rows=self._segment_rows,
            segment_positions=self._segment_positions,
            page_indptr=self._entries,
            row_indptr=self._rows[: num_rows + 1],
            row_segments=self._rows[:-1],
            segment_entries=self._entries,
            table=self._step_table,
            page_indices=None,
            run_indptr=None,
            runs=None,
            staged_pages=None,
        )

    def _width(self, queries: int) -> int:
        """The most pages that a row with so many queries reads."""
        most = -(-(self.reach.most(queries) + self.page_size - 1) // self.page_size)
        return min(most, -(-self._max_tokens // self.page_size))
