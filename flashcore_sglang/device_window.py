"""The last positions of each request in device memory: what layers read whose tokens do not see everything.

Where ``DevicePager`` keeps all of a request's pages, this keeps those that a sliding window or a chunk reaches,
translated where such layers have a pool of their own. Positions are counted from ``bases``, page boundaries at or
before the first position that is read: shifting a request's positions changes neither what is causal nor what a
window reaches. Every request reads its own pages. New tokens in several chunks are several rows, one for each chunk.

It has the methods of ``DevicePager`` that ``GpuDecode`` and ``GpuExtend`` use, and takes its place there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashcore_sglang.device_pager import DeviceLayout
from flashcore_sglang.reach import Reach


class _Cut(NamedTuple):
    """What the last snapshot read: of each request its length and the position of its first query; of each row its
    base, and its request if that is not the row's own number; the most queries of a request."""

    lens: torch.Tensor
    first: torch.Tensor
    bases: torch.Tensor
    request: torch.Tensor | None
    max_queries: int


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
        self._max_queries = max_queries
        self._mask = self._step_mask = torch.ones(0, dtype=torch.bool, device=device)
        self._cut: _Cut | None = None

    def make_mask(self, max_requests: int) -> None:
        """Room for the masks of trees of ``max_queries`` drafts, which then do not move."""
        rows = self.rows_of(max_requests, max_requests * self._max_queries)
        self._mask = self._mask.new_ones(rows * self._max_queries * self._stride * self.page_size)

    @property
    def mask(self) -> torch.Tensor:
        """The custom mask of the last snapshot, by positions as they are counted here."""
        return self._step_mask

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
        of: torch.Tensor | None = None
        lens, first = ends, ends - queries
        if self.reach.chunk and q_lens is not None:
            of, starts, ends, queries = self._split(ends, queries)
            rows = rows[of]
        else:
            starts = self.reach.begin(first).clamp_(min=0)
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
        self._cut = _Cut(lens, first, bases, of, max_queries)

    def take_mask(self, mask: torch.Tensor) -> None:
        """Cuts a custom mask to what the last snapshot's rows read: their queries by the positions from their base on.

        ``mask``: [sum of q_lens * seq_lens] bool, of the requests of the snapshot.
        """
        assert self._cut is not None, "take_mask before snapshot"
        lens, first, bases, of, max_queries = self._cut
        queries, held = self.q_lens.long(), self.lens.long().clamp(min=1)
        sizes = (lens - first) * lens
        begins = sizes.cumsum(0) - sizes  # of each request in `mask`
        if of is not None:
            begins, lens, first = begins[of], lens[of], first[of]
        skipped = bases + self.lens - queries - first  # queries of the request before the row's
        cells = queries * held
        before = cells.cumsum(0)
        size = self.num_rows * max_queries * self._width(max_queries) * self.page_size
        self._step_mask = self._mask if size <= self._mask.numel() else self._mask.new_ones(size)
        cell = torch.arange(size, device=mask.device)
        row = torch.searchsorted(before, cell, right=True).clamp_(max=self.num_rows - 1)
        cell -= (before - cells)[row]
        query, position = cell // held[row], cell % held[row]
        source = begins[row] + (skipped[row] + query) * lens[row] + bases[row] + position
        self._step_mask[:size] = mask[source.clamp_(0, mask.numel() - 1)]

    def _split(
        self, ends: torch.Tensor, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Request, first position, end and queries of each chunk that has queries, request after request."""
        chunk, first = self.reach.chunk, ends - queries
        first_chunk = first // chunk
        counts = torch.where(queries > 0, (ends - 1) // chunk - first_chunk + 1, 0)
        before = counts.cumsum(0)
        index = self._rows[: self.num_rows].to(before.dtype)
        of = torch.searchsorted(before, index, right=True).clamp(max=len(ends) - 1)
        begins = (first_chunk[of] + index - (before - counts)[of]) * chunk
        stops = torch.minimum(ends[of], begins + chunk)
        used = index < before[-1]
        zero = torch.zeros_like(begins)
        queries = torch.where(used, stops - torch.maximum(first[of], begins), zero)
        return of, torch.where(used, begins, zero), torch.where(used, stops, zero), queries

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
