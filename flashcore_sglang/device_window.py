"""The last positions of each request in device memory: what layers read whose tokens do not see everything.

Where ``DevicePager`` keeps all of a request's pages, this keeps those that a sliding window or a chunk reaches,
translated where such layers have a pool of their own. Positions are counted from ``bases``, page boundaries at or
before the first position that is read: shifting a request's positions changes neither what is causal nor what a
window reaches. Every request reads its own pages. New tokens in several chunks are several rows, one for each chunk.

It has the methods of ``DevicePager`` that ``GpuDecode`` and ``GpuExtend`` use, and takes its place there.
"""

from __future__ import annotations

import torch

from flashcore_sglang.device_pager import DeviceLayout
from flashcore_sglang.reach import Reach


class DeviceWindow:
    """Tables and segments of windows.

    Args:
        page_size:   tokens per page.
        reach:       of the layers; chunks are whole pages.
        max_rows:    the largest batch, padding included.
        max_queries: new tokens of a request that there is room for; where a step has more, its table is allocated.
        max_tokens:  the longest request; longer ones are cut.
        num_pages:   pages of the pool that is read; ids outside are brought inside.
        device:      of all tensors.
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
    ) -> None:
        if reach.everything or reach.chunk % page_size:
            raise ValueError(f"reach: want a window, or chunks of whole pages of {page_size} tokens, got {reach}")
        self.page_size, self.reach, self.max_rows, self.num_rows = page_size, reach, max_rows, 1
        self._num_pages, self._max_tokens = num_pages, max_tokens
        ints = {"dtype": torch.int32, "device": device}
        self._columns = torch.arange(-(-max_tokens // page_size), device=device) * page_size
        self._rows = torch.arange(max_rows + 1, **ints)
        self._segment_rows = torch.stack([self._rows[:-1], self._rows[1:]], dim=1).contiguous()
        self._segment_positions = torch.zeros(max_rows, 2, **ints)
        self._lens, self._q_lens = torch.zeros(max_rows, **ints), torch.zeros(max_rows, **ints)
        self._one = torch.ones(1, **ints)
        self._sizes, self._status = torch.zeros(8, **ints), torch.zeros(4, **ints)
        self._stride = self._width(max_queries)
        self._table = torch.zeros(max_rows * self._stride, **ints)
        self._entries = self._rows * self._stride
        self._step_table, self._step_entries, self._step_stride = self._table, self._entries, self._stride

    @property
    def mebibytes(self) -> float:
        """Device memory of all buffers."""
        return (self._table.numel() + 7 * self.max_rows) * 4 / 2**20

    @property
    def table_stride(self) -> int:
        """Entries of a row in ``DeviceLayout.table``, of the last snapshot."""
        return self._step_stride

    @property
    def lens(self) -> torch.Tensor:
        """[num_rows] int32: lengths of the last snapshot's rows, counted from their bases."""
        return self._lens[: self.num_rows]

    @property
    def q_lens(self) -> torch.Tensor:
        """[num_rows] int32: new tokens of the last snapshot's rows."""
        return self._q_lens[: self.num_rows]

    def rows_of(self, requests: int, num_tokens: int) -> int:
        """The most rows that so many requests with so many new tokens take."""
        chunk = self.reach.chunk
        return requests if not chunk else max(1, min(num_tokens, 2 * requests + num_tokens // chunk))

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
        """Copies what the batch reads; nothing is read on the host. Not for capture.

        Args:
            req_to_token, req_pool_indices, seq_lens: as for ``DevicePager.snapshot``.
            q_lens:      [B] int32 or int64, the last tokens of each request that are queries; None: one each.
            num_tokens:  their sum, and max_queries: the most of them of one request, where ``q_lens`` is given.
            slot_map:    [slots] the slot of these layers' pool for each slot of the table; None: itself.

        Raises ValueError for more rows than there is room for.
        """
        requests = req_pool_indices.numel()
        self.num_rows = batch = requests if q_lens is None else self.rows_of(requests, num_tokens)
        if not 1 <= batch <= self.max_rows:
            raise ValueError(f"req_pool_indices: want 1 .. {self.max_rows} rows, got {batch}")
        stride = self._width(max_queries)
        if stride <= self._stride:
            self._step_table, self._step_entries, self._step_stride = self._table, self._entries, self._stride
        else:
            self._step_table = self._table.new_empty(batch * stride)
            self._step_entries, self._step_stride = self._rows * stride, stride
        pool_rows, width = req_to_token.shape
        rows, ends = req_pool_indices.clamp(0, pool_rows - 1), seq_lens.clamp(0, min(self._max_tokens, width))
        queries = self._one if q_lens is None else torch.minimum(q_lens, ends)
        if self.reach.chunk and q_lens is not None:
            rows, starts, ends, queries = self._split(rows, ends, queries)
        else:
            starts = self.reach.begin(ends - queries).clamp_(min=0)
        bases = starts if self.page_size == 1 else starts // self.page_size * self.page_size
        positions = (bases[:, None] + self._columns[:stride]).clamp_(max=width - 1)
        slots = req_to_token[rows[:, None], positions]
        if slot_map is not None:
            slots = slot_map[slots.clamp_(0, slot_map.numel() - 1)]
        pages = slots if self.page_size == 1 else slots // self.page_size
        table = self._step_table.view(-1, self._step_stride)[:batch, :stride]
        table.copy_(pages.clamp_(0, self._num_pages - 1))
        self._lens[:batch] = ends - bases
        self._segment_positions[:batch, 0] = starts - bases
        self._segment_positions[:batch, 1] = self._lens[:batch]
        self._q_lens[:batch] = queries
        self._sizes[:1].fill_(batch)  # a kernel: a copy from the host would wait

    def _split(
        self, rows: torch.Tensor, ends: torch.Tensor, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, first positions, ends and queries of each chunk that has queries, request after request."""
        chunk, first = self.reach.chunk, ends - queries
        first_chunk = first // chunk
        counts = torch.where(queries > 0, (ends - 1) // chunk - first_chunk + 1, 0)
        before = counts.cumsum(0)
        index = self._rows[: self.num_rows].to(before.dtype)
        of = torch.searchsorted(before, index, right=True).clamp(max=len(rows) - 1)
        begins = (first_chunk[of] + index - (before - counts)[of]) * chunk
        stops = torch.minimum(ends[of], begins + chunk)
        used = index < before[-1]
        zero = torch.zeros_like(begins)
        queries = torch.where(used, stops - torch.maximum(first[of], begins), zero)
        return rows[of], torch.where(used, begins, zero), torch.where(used, stops, zero), queries

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
            page_indptr=self._step_entries,
            row_indptr=self._rows[: num_rows + 1],
            row_segments=self._rows[:-1],
            segment_entries=self._step_entries,
            table=self._step_table,
            page_indices=None,
            run_indptr=None,
            runs=None,
            staged_pages=None,
        )

    def _width(self, queries: int) -> int:
        most = -(-(self.reach.most(queries) + self.page_size - 1) // self.page_size)
        return min(most, self._columns.numel())
