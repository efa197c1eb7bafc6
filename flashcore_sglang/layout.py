"""The CSR layout: which KV pages a batch reads, and which requests read each of them.

B requests ("rows") read ranges of positions from a paged KV cache. Position ``p`` of row ``r`` lies in slot
``page * page_size + p % page_size``, where ``page`` is what the row's table names for block ``p // page_size``. A
*segment* is an interval of positions that a set of rows reads from the same pages. The pager finds the segments, so
that attention can read every page once for all of its rows.

Every (row, position) of the ranges is covered by exactly one segment, or its page is in ``staged_pages``. Rows share a
segment only where their ids were compared and found equal. The same input gives the same layout, bit for bit, on
the CPU and on the GPU.

How the segments come about. Rows are sorted by their page sequences; the longest common prefixes (LCP) of neighbours
form a tree. A node of it (rows that agree up to a depth) is kept as a segment if that pays under the ``CostModel``,
bottom-up; otherwise its children read its pages each by themselves. What no kept node covers, each row reads alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from flashcore_sglang import build
from flashcore_sglang.config import CostModel
from flashcore_sglang.config import cost_model as default_cost_model

if TYPE_CHECKING:
    from flashcore_sglang.device_pager import DeviceLayout

_MAX_PAGE_SIZE = 2**20


@dataclass(frozen=True)
class CsrLayout:
    """Segments of a batch. Arrays are int32, contiguous; B rows, S segments, N page entries, U runs, E row entries.

    Written by the pager, read by every attention kernel and by ``reference``.

    Attributes:
        page_size:         tokens per page.
        row_order:         [B] permutation of the rows: depth-first order of the prefix forest. Rows that may share
                           come first, sorted by page sequence (a prefix before its extensions, equal rows by index).
        segment_rows:      [S, 2] half-open range in ``row_order`` of the rows that read the segment.
        segment_positions: [S, 2] half-open range of absolute positions, in tokens.
        page_indptr:       [S + 1] CSR offsets into ``page_indices``.
        page_indices:      [N] page of each block of a segment in position order. The first and the last block may be
                           cut by ``segment_positions``.
        run_indptr:        [S + 1] CSR offsets into ``runs``.
        runs:              [U, 2] maximal runs of consecutive slots inside a segment: (first slot, number of slots).
        row_indptr:        [B + 1] CSR offsets into ``row_segments``, by row.
        row_segments:      [E] segments of a row by increasing position, which is the order of the merge.
        staged_pages:      [M] wanted pages that are not resident, ascending, each once.
        status:            (code, row, position, value) of the first bound that the input violated; code 0: none. The
                           offending entry was read as page 0 or the range was cut, never anything outside the pool.
        appended:          the layout came about by appending to the one before (``CsrPager``), not by a rebuild.

    Segments are sorted by (first row in ``row_order``, first position): parents before children. S <= 4B, plus one for
    every cut by staging; N <= total blocks + S; U <= N; E <= B (B + 1) / 2 + 2B, plus cuts.
    """

    page_size: int
    row_order: torch.Tensor
    segment_rows: torch.Tensor
    segment_positions: torch.Tensor
    page_indptr: torch.Tensor
    page_indices: torch.Tensor
    run_indptr: torch.Tensor
    runs: torch.Tensor
    row_indptr: torch.Tensor
    row_segments: torch.Tensor
    staged_pages: torch.Tensor
    status: tuple[int, int, int, int]
    appended: bool = False

    @property
    def num_rows(self) -> int:
        return self.row_order.numel()

    @property
    def num_segments(self) -> int:
        return self.segment_rows.shape[0]

    @property
    def is_complete(self) -> bool:
        """Whether segments cover every position, so that attention may run: no page is missing."""
        return self.staged_pages.numel() == 0

    @property
    def tokens_stored(self) -> int:
        """Tokens of KV that attention reads with this layout."""
        return int((self.segment_positions[:, 1] - self.segment_positions[:, 0]).sum())

    @property
    def tokens_wanted(self) -> int:
        """Tokens of KV that attention would read if every row read its own."""
        rows = self.segment_rows[:, 1] - self.segment_rows[:, 0]
        return int((rows * (self.segment_positions[:, 1] - self.segment_positions[:, 0])).sum())


_ARRAYS = tuple(f.name for f in fields(CsrLayout) if f.name not in ("page_size", "status", "appended"))


def build_layout(
    token_to_page: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_ends: torch.Tensor,
    page_resident_bitmap: torch.Tensor | None = None,
    *,
    page_tokens: int,
    num_pages: int,
    cost_model: CostModel | None = None,
) -> CsrLayout | DeviceLayout:
    """Layout of a batch of position ranges over a table of pages.

    Args:
        token_to_page: [B, T] int32, the page of each position; all positions of a page-aligned block name the same
            page. Or one id per page: [B, T // page_tokens, page_tokens] whose last stride is 0, as
            ``pages.unsqueeze(-1).expand(-1, -1, page_tokens)`` gives. Ids outside a row's range are never looked at.
        seq_starts, seq_ends: [B] int32 or int64, half-open ranges of positions; they may begin or end inside a page.
        page_resident_bitmap: which pages are on the device: [num_pages] bool or uint8, or packed bits
            [ceil(num_pages / 32)] int32, page ``p`` in bit ``p % 32`` of word ``p // 32``. None: all are.
        page_tokens: tokens per page.
        num_pages: pages of the pool; valid ids are ``0 <= id < num_pages``.
        cost_model: when sharing pays; None: that of configs/ for the device.

    All tensors on the CPU, or all on one Hopper GPU: ``device_pager.build_layout`` then gives the same layout in device
    memory without reading anything on the host. On the CPU raises ValueError for a wrong dtype, shape, stride or
    device, a start > end, a range beyond the table, a page id outside the pool, and a block that names two pages; on
    the GPU what the tensors hold is cut and reported instead.
    """
    if isinstance(token_to_page, torch.Tensor) and token_to_page.is_cuda:
        from flashcore_sglang import device_pager  # which imports this module

        return device_pager.build_layout(
            token_to_page, seq_starts, seq_ends, page_resident_bitmap,
            page_tokens=page_tokens, num_pages=num_pages, cost_model=cost_model,
        )  # fmt: skip
    _want_page_size("page_tokens", page_tokens)
    _want_num_pages(num_pages, page_tokens)
    table, entry_tokens = page_table(token_to_page, page_tokens, "cpu")
    begins = _row_vector("seq_starts", seq_starts, table.shape[0])
    ends = _row_vector("seq_ends", seq_ends, table.shape[0])
    pager = CsrPager(page_tokens, num_pages=num_pages, cost_model=cost_model)
    resident, packed = _bitmap(page_resident_bitmap, num_pages)
    layout = pager._step(table, entry_tokens, 1, None, begins, ends, None, resident, packed, check_blocks=True)
    if layout.status[0]:
        width, ids = entry_tokens * table.shape[1], f"0 <= page < {num_pages}"
        raise ValueError(describe_status(layout.status, "token_to_page", "seq_ends", ids, width, "seq_starts"))
    return layout


def build_layout_from_slots(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    *,
    num_pages: int | None = None,
    cost_model: CostModel | None = None,
) -> CsrLayout:
    """Layout of a batch over SGLang's table of slots; ``build_layout`` with ``page = slot // page_size``.

    Args:
        req_to_token: [pool, max_context] int32, slot of each position; pages are aligned (``slot % page_size ==
            position % page_size``). Row 0 is SGLang's padding row: requests that point at it are never grouped.
        req_pool_indices: [B] int32 or int64, row of each request.
        seq_lens: [B] int32 or int64, tokens of each request, 0 allowed.
        page_size: tokens per page.
        num_pages: pages of the pool; None: ids are not bounded above.

    All tensors on the CPU. Raises ValueError as ``build_layout``, and for an index outside ``req_to_token``.
    """
    _want_page_size("page_size", page_size)
    pager = CsrPager(page_size, num_pages=num_pages, cost_model=cost_model)
    layout = pager.step(req_to_token, req_pool_indices, seq_lens, check_blocks=True)
    if layout.status[0]:
        ids = "slot >= 0" if num_pages is None else f"0 <= slot < {num_pages * page_size}"
        raise ValueError(describe_status(layout.status, "req_to_token", "seq_lens", ids, req_to_token.shape[1]))
    return layout


class CsrPager:
    """Layouts for step after step of a batch over SGLang's table of slots.

    Keeps a private snapshot of what the last step read. If a step finds every old entry equal, and rows only appended
    tokens, the forest of the last step is extended; otherwise it is rebuilt. Both give the same layout.

    Args:
        page_size:  tokens per page.
        num_pages:  pages of the pool, of at most 2**31 slots; None: ids are not bounded above.
        cost_model: when sharing pays; None: that of configs/ for a CPU.
        sharing:    False: every row reads its own pages.
    """

    def __init__(
        self,
        page_size: int,
        *,
        num_pages: int | None = None,
        cost_model: CostModel | None = None,
        sharing: bool = True,
    ) -> None:
        _want_page_size("page_size", page_size)
        if num_pages is not None:
            _want_num_pages(num_pages, page_size)
        cost = cost_model or default_cost_model("cpu")
        self.page_size = page_size
        self.sharing = sharing
        self._run = build.library("cpu").make_pager(
            page_size, num_pages or 2**31 // page_size, cost.token_cost, cost.segment_cost, cost.partial_cost
        )

    def step(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        check_blocks: bool = False,
    ) -> CsrLayout:
        """Layout of ``[0, seq_lens)`` of each row; arguments as for ``build_layout_from_slots``.

        Never raises for what the tables hold, and never reads outside them: ``layout.status`` says what was wrong.
        ``check_blocks`` also verifies that slots of a block are consecutive and aligned.
        """
        if not _is_cpu(req_to_token, torch.int32) or req_to_token.ndim != 2:
            raise ValueError(
                f"req_to_token: want a [pool, max_context] int32 CPU tensor, got {_describe(req_to_token)}"
            )
        rows = _row_vector("req_pool_indices", req_pool_indices, None)
        ends = _row_vector("seq_lens", seq_lens, rows.numel())
        may_share = (rows != 0).to(torch.int32) if self.sharing else torch.zeros(rows.numel(), dtype=torch.int32)
        return self._step(req_to_token, 1, self.page_size, rows, None, ends, may_share, None, False, check_blocks)

    def _step(
        self,
        table: torch.Tensor,
        entry_tokens: int,
        divisor: int,
        rows: torch.Tensor | None,
        begins: torch.Tensor | None,
        ends: torch.Tensor,
        may_share: torch.Tensor | None,
        resident: torch.Tensor | None,
        packed: bool,
        check_blocks: bool,
    ) -> CsrLayout:
        arrays: Any = self._run(
            table, entry_tokens, divisor, rows, begins, ends, may_share, resident, packed, check_blocks
        )
        status, *tensors = (torch.from_dlpack(a) for a in arrays)
        values = dict(zip(_ARRAYS, tensors, strict=True))
        code, row, position, value, appended = status.tolist()
        return CsrLayout(
            page_size=self.page_size, **values, status=(code, row, position, value), appended=bool(appended)
        )


def _describe(t: Any) -> str:
    if not isinstance(t, torch.Tensor):
        return type(t).__name__
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _want_page_size(name: str, value: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= _MAX_PAGE_SIZE:
        raise ValueError(f"{name}: want an integer, 1 to {_MAX_PAGE_SIZE}, got {value!r}")


def _want_num_pages(value: int, page_size: int) -> None:
    most = 2**31 // page_size  # slots are int32
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"num_pages: want an integer, 1 to {most}, got {value!r}")


def _is_cpu(t: Any, *dtypes: torch.dtype) -> bool:
    return isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.dtype in dtypes


def _row_vector(name: str, t: torch.Tensor, num_rows: int | None) -> torch.Tensor:
    """[B] int32/int64 on the CPU as contiguous int64."""
    if not _is_cpu(t, torch.int32, torch.int64) or t.ndim != 1:
        raise ValueError(f"{name}: want a [B] int32 or int64 CPU tensor, got {_describe(t)}")
    if num_rows is not None and t.numel() != num_rows:
        raise ValueError(f"{name}: want {num_rows} entries, one per row, got {t.numel()}")
    return t.to(torch.int64).contiguous()


def page_table(t: torch.Tensor, page_tokens: int, device: str) -> tuple[torch.Tensor, int]:
    """``token_to_page`` as [B, entries], and the number of positions per entry: 1 or ``page_tokens``."""
    if not isinstance(t, torch.Tensor) or t.device.type != device or t.dtype != torch.int32 or t.ndim not in (2, 3):
        raise ValueError(
            f"token_to_page: want an int32 {device.upper()} tensor of 2 or 3 dimensions, got {_describe(t)}"
        )
    if t.ndim == 2:
        return t, 1
    if t.shape[2] != page_tokens or (t.stride(2) != 0 and page_tokens > 1):
        raise ValueError(
            f"token_to_page: want last dimension {page_tokens} (page_tokens) of stride 0, got {t.shape[2]} of stride "
            f"{t.stride(2)}; pass pages.unsqueeze(-1).expand(-1, -1, page_tokens), or one id per position as [B, T]"
        )
    return t[:, :, 0], page_tokens


def _bitmap(t: torch.Tensor | None, num_pages: int) -> tuple[torch.Tensor | None, bool]:
    """The residency bitmap as bytes, and whether it is packed."""
    if t is None:
        return None, False
    packed = isinstance(t, torch.Tensor) and t.dtype == torch.int32
    want = (num_pages + 31) // 32 if packed else num_pages
    if not _is_cpu(t, torch.bool, torch.uint8, torch.int32) or t.shape != (want,):
        raise ValueError(
            f"page_resident_bitmap: want [{num_pages}] bool or uint8, or [{(num_pages + 31) // 32}] int32 of packed "
            f"bits, on the CPU, got {_describe(t)}"
        )
    return t.clone(memory_format=torch.contiguous_format).view(torch.uint8), packed


def describe_status(
    status: tuple[int, int, int, int], table: str, ends: str, ids: str, width: int, starts: str | None = None
) -> str:
    """What `layout.status` says, as ``<argument>: want <rule>, got <value>``; the names are those of the caller's.

    Args:
        ids: the rule of the table's entries. width: positions a row of the table can hold.
        starts: None if rows begin at 0.
    """
    code, row, position, value = status
    return {
        1: f"{table}: want {ids}, got {value} at row {row}, position {position}",
        2: f"{ends}: want at most {width}, the positions the table can hold, got {value} at row {row}",
        3: (
            f"{starts}, {ends}: want 0 <= start <= end, got start {position}, end {value} at row {row}"
            if starts
            else f"{ends}: want >= 0, got {value} at row {row}"
        ),
        4: f"{table}: want one aligned page per block of positions, got id {value} at row {row}, position {position}",
        5: f"req_pool_indices: want a row of {table}, got {value} at row {row}",
    }[code]
