"""The pager on the GPU: the layout of ``layout.CsrPager`` without the host, for decode under CUDA graphs.

A step is two launches. ``snapshot`` runs outside the graph and is the only reader of SGLang's table; ``build`` is
captured in the graph and works on the snapshot alone. All buffers are made by the constructor and never move.
csrc/pager/device_pager.h says how it works, what it costs and why its arrays are as large as they are.

``build_layout`` is the general form: any ranges of a table of pages, with a residency bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore_sglang import build
from flashcore_sglang.config import CostModel
from flashcore_sglang.config import cost_model as measured_cost_model
from flashcore_sglang.layout import CsrLayout, page_table
from flashcore_sglang.requirements import GPU_MAX_REQUESTS

MAX_ROWS = GPU_MAX_REQUESTS
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class DeviceLayout:
    """A layout in device memory: the arrays of ``CsrLayout`` at full capacity, of which ``sizes`` says what is used.

    Attributes:
        page_size:         tokens per page.
        sizes:             [8] S, N, U, E, M, whether it came about by appending, 0, 0.
        status:            [4] as ``CsrLayout.status``.
        row_order:         [B]
        segment_rows:      [segments, 2]
        segment_positions: [segments, 2]
        page_indptr:       [segments + 1]
        row_indptr:        [B + 1]
        row_segments:      [entries]
        segment_entries:   [segments + 1] first entry of each segment in ``table``: the page of its block b, from 0 on,
                           is ``table[segment_entries[s] + b]``. In a kernel's arguments (``segment_entries``,
                           ``table``) stand for (``page_indptr``, ``page_indices``). The last one is not used.
        table:             [rows * pages] the snapshot.
        page_indices, run_indptr, runs: as ``CsrLayout``; None unless the pager is canonical or staging.
        staged_pages:      [pages] as ``CsrLayout``; None unless the pager is staging: all pages are resident.
    """

    page_size: int
    sizes: torch.Tensor
    status: torch.Tensor
    row_order: torch.Tensor
    segment_rows: torch.Tensor
    segment_positions: torch.Tensor
    page_indptr: torch.Tensor
    row_indptr: torch.Tensor
    row_segments: torch.Tensor
    segment_entries: torch.Tensor
    table: torch.Tensor
    page_indices: torch.Tensor | None
    run_indptr: torch.Tensor | None
    runs: torch.Tensor | None
    staged_pages: torch.Tensor | None

    def to_cpu(self) -> CsrLayout:
        """The layout on the CPU, cut to its sizes. Synchronises. Raises ValueError unless the pager is canonical."""
        if self.page_indices is None or self.run_indptr is None or self.runs is None:
            raise ValueError("layout: want one of a canonical pager, got one whose pages lie in its snapshot")
        segments, pages, runs, entries, staged, appended, _, _ = self.sizes.tolist()
        code, row, position, value = self.status.tolist()
        return CsrLayout(
            page_size=self.page_size,
            row_order=self.row_order.cpu(),
            segment_rows=self.segment_rows[:segments].cpu(),
            segment_positions=self.segment_positions[:segments].cpu(),
            page_indptr=self.page_indptr[: segments + 1].cpu(),
            page_indices=self.page_indices[:pages].cpu(),
            run_indptr=self.run_indptr[: segments + 1].cpu(),
            runs=self.runs[:runs].cpu(),
            row_indptr=self.row_indptr.cpu(),
            row_segments=self.row_segments[:entries].cpu(),
            staged_pages=torch.empty(0, dtype=torch.int32)
            if self.staged_pages is None
            else self.staged_pages[:staged].cpu(),
            status=(code, row, position, value),
            appended=bool(appended),
        )


class DevicePager:
    """Layouts in device memory, equal to ``CsrPager``'s field by field.

    Args:
        page_size:  tokens per page: 1, 16, 32, 64, 128 or another power of two up to 1024.
        max_rows:   the largest batch, padding included: 1 to 1024.
        max_tokens: the longest request. Longer ones are cut and reported.
        num_pages:  pages of the pool; ids outside are read as page 0 and reported.
        cost_model: when sharing pays; None: the one measured on Hopper.
        sharing:    False: every row reads its own pages.
        canonical:  also write ``page_indices``, ``run_indptr`` and ``runs``, which repeat what the snapshot holds.
        max_entries: the most entries of ``row_segments``, at least ``max_rows``. A batch that would have more shares
                    nothing. None: no bound.
        ranged:     rows may begin after position 0 (``snapshot_ranges``); every build is then a rebuild.
        staging:    ``build`` takes a residency bitmap, and the layout is canonical. Four launches more.
        device:     a CUDA device.

    Raises ValueError for sizes that are not served, RuntimeError if CUDA refuses.
    """

    def __init__(
        self,
        page_size: int,
        *,
        max_rows: int,
        max_tokens: int,
        num_pages: int,
        cost_model: CostModel | None = None,
        sharing: bool = True,
        canonical: bool = False,
        max_entries: int | None = None,
        ranged: bool = False,
        staging: bool = False,
        device: torch.device | str = "cuda",
    ) -> None:
        library = build.library("cuda")
        cost = cost_model or measured_cost_model("hopper")
        options = {
            "max_rows": max_rows,
            "row_pages": -(-max_tokens // page_size),
            "page_size": page_size,
            "num_pages": min(num_pages, _INT_MAX),
            "max_entries": _INT_MAX if max_entries is None else max_entries,
            "token_cost": cost.token_cost,
            "segment_cost": cost.segment_cost,
            "partial_cost": cost.partial_cost,
            "sharing": int(sharing),
            "canonical": int(canonical or staging),
            "ranged": int(ranged),
            "staging": int(staging),
            "ctas": torch.cuda.get_device_properties(device).multi_processor_count,
        }
        self.page_size = page_size
        self.max_rows = max_rows
        arrays = library.device_pager_arrays(options)
        self._spans = {str(name): (int(span[0]), int(span[1])) for name, span in arrays.items()}
        _, total = self._spans.pop("")
        self._memory = torch.zeros(total, dtype=torch.int32, device=device)
        self._array("mismatch").fill_(-1)
        self._report = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._snapshot, self._snapshot_ranges, self._snapshot_drafts, self._build = library.make_device_pager(
            self._memory, self._report, options
        )
        self._layouts: dict[int, DeviceLayout] = {}

    @property
    def mebibytes(self) -> float:
        """Device memory of all buffers."""
        return self._memory.numel() * 4 / 2**20

    @property
    def table_stride(self) -> int:
        """Entries of a row in ``DeviceLayout.table``: the pages of row r are from ``r * table_stride`` on."""
        return self._spans["table"][1] // self.max_rows

    @property
    def row_entries(self) -> None:
        """None: rows begin in ``DeviceLayout.table`` where ``table_stride`` says."""

    def snapshot(self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Copies what the batch reads; the step's ``build`` and attention read the copy. One launch, current stream.

        Args:
            req_to_token:     [pool, max_context] int32, slot of each position, last stride 1. Row 0 is SGLang's padding
                              row: requests that point at it are never grouped.
            req_pool_indices: [B] int32 or int64, row of each request.
            seq_lens:         [B] int32 or int64, tokens of each request, 0 allowed.

        Raises ValueError for a wrong shape, dtype or device. What the tables hold is never an error: see ``violation``.
        """
        self._snapshot(self._memory, req_to_token, req_pool_indices, seq_lens)

    def snapshot_ranges(self, token_to_page: torch.Tensor, seq_starts: torch.Tensor, seq_ends: torch.Tensor) -> None:
        """As ``snapshot``, of position ranges over a table of pages, for a pager that is ``ranged``.

        Args:
            token_to_page:        as for ``layout.build_layout``. Of a block, the id at its first position in the range
                                  is read; that the others name the same page is not checked.
            seq_starts, seq_ends: [B] int32 or int64, half-open ranges of positions.

        Raises ValueError as ``snapshot``.
        """
        pages, tokens = page_table(token_to_page, self.page_size, "cuda")
        self._snapshot_ranges(self._memory, pages, tokens > 1, seq_starts, seq_ends)

    def snapshot_drafts(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        branches: int,
        steps: int,
    ) -> None:
        """Copies what the steps of a draft model read: a row for each branch of each request. One launch.

        Args:
            req_to_token, req_pool_indices, seq_lens: as for ``snapshot``; the lengths leave the drafts out.
            branches, steps: as ``step.Drafts`` has them; at most ``max_rows`` branches in all, and 1,024 steps.

        A row ends with its branch's first draft; ``row_ends`` may be moved on to the last before another ``build``.

        Raises ValueError as ``snapshot``, and for a pager that is ``ranged``.
        """
        self._snapshot_drafts(self._memory, req_to_token, req_pool_indices, seq_lens, branches, steps)

    @property
    def row_ends(self) -> torch.Tensor:
        """[max_rows] int32: tokens of each row, which ``build`` reads."""
        return self._array("row_end")

    def build(self, page_resident_bitmap: torch.Tensor | None = None) -> None:
        """The layout of the last snapshot, into the buffers of ``layout``. One launch, current stream, capturable.

        All blocks wait for one another, so two pagers of a process do not build on two streams at the same time.

        Args:
            page_resident_bitmap: for a pager that is ``staging``, as for ``layout.build_layout``; None: all pages are
                                  resident.
        """
        self._build(self._memory, page_resident_bitmap)

    def layout(self, num_rows: int) -> DeviceLayout:
        """The buffers that ``build`` writes, for a batch of ``num_rows``. Views, the same memory every time."""
        if not 1 <= num_rows <= self.max_rows:
            raise ValueError(f"num_rows: want 1 .. {self.max_rows}, got {num_rows}")
        if num_rows not in self._layouts:
            self._layouts[num_rows] = self._make_layout(num_rows)
        return self._layouts[num_rows]

    def _make_layout(self, num_rows: int) -> DeviceLayout:
        staged = "staged.sizes" in self._spans

        def array(name: str) -> torch.Tensor:
            return self._array(f"staged.{name}" if staged else name)

        canonical = staged or self._spans["page_indices"][1] > 0
        return DeviceLayout(
            page_size=self.page_size,
            sizes=array("sizes"),
            status=self._array("status"),
            row_order=self._array("row_order")[:num_rows],
            segment_rows=array("segment_rows").view(-1, 2),
            segment_positions=array("segment_positions").view(-1, 2),
            page_indptr=array("page_indptr"),
            row_indptr=array("row_indptr")[: num_rows + 1],
            row_segments=array("row_segments"),
            segment_entries=array("segment_entries"),
            table=self._array("table"),
            page_indices=array("page_indices") if canonical else None,
            run_indptr=array("run_indptr") if canonical else None,
            runs=array("runs").view(-1, 2) if canonical else None,
            staged_pages=array("staged_pages") if staged else None,
        )

    @property
    def sizes(self) -> torch.Tensor:
        """[8] int32, as ``DeviceLayout.sizes``; written by ``build``."""
        return self._array("sizes")

    def pages_wanted(self, num_rows: int) -> torch.Tensor:
        """[1] int64: pages of the last snapshot's ``num_rows`` rows, if each reads its own. Launches on the GPU."""
        ends = self.row_ends[:num_rows]
        return ((ends + (self.page_size - 1)) // self.page_size).sum(dim=0, keepdim=True)

    def violation(self) -> tuple[int, int, int, int] | None:
        """A bound that an earlier step violated, as ``CsrLayout.status``; None if there was none since the last call.

        Where rows begin after position 0, the position is that of the block, and 0 for a start after its end;
        ``DeviceLayout.status`` has it exactly.

        Reads one word of pinned memory that the GPU writes: no synchronisation, so a step in flight is not in it yet.
        ``layout.describe_status`` puts it into words.
        """
        report = int(self._report[0])
        if report == 0:
            return None
        self._report[0] = 0
        word = (
            ~report
        )  # bit 62: an id, not a range; 52 .. 61 row; 32 .. 51 block, or the code of a range; 0 .. 31 value
        row, block_or_code = word >> 52 & 0x3FF, word >> 32 & 0xFFFFF
        value = (word & 0xFFFFFFFF) - (word >> 31 & 1) * 2**32
        return (1, row, block_or_code * self.page_size, value) if word >> 62 & 1 else (block_or_code, row, 0, value)

    def _array(self, name: str) -> torch.Tensor:
        offset, elements = self._spans[name]
        return self._memory[offset : offset + elements]


def build_layout(
    token_to_page: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_ends: torch.Tensor,
    page_resident_bitmap: torch.Tensor | None = None,
    *,
    page_tokens: int,
    num_pages: int,
    cost_model: CostModel | None = None,
) -> DeviceLayout:
    """``layout.build_layout`` for CUDA tensors: the same layout, in device memory.

    Nothing is read on the host. What the tables hold is never an error: a violated bound is cut and is in
    ``DeviceLayout.status``. At most 1,024 rows, and pages of a power of two of up to 1,024 tokens.

    Allocates; for step after step make one ``DevicePager`` with ``ranged=True``.
    Raises ValueError for a wrong shape, dtype, stride or device, and for sizes that are not served.
    """
    pages, tokens = page_table(token_to_page, page_tokens, "cuda")
    pager = DevicePager(
        page_tokens,
        max_rows=pages.shape[0],
        max_tokens=max(1, pages.shape[1] * tokens),
        num_pages=num_pages,
        cost_model=cost_model,
        canonical=True,
        ranged=True,
        staging=page_resident_bitmap is not None,
        device=token_to_page.device,
    )
    pager.snapshot_ranges(token_to_page, seq_starts, seq_ends)
    pager.build(page_resident_bitmap)
    return pager.layout(pages.shape[0])
