"""The pager's place beside emulated kernels."""

from __future__ import annotations

import torch

from flashcore_sglang.config import CostModel
from flashcore_sglang.device_pager import DeviceLayout
from flashcore_sglang.layout import CsrPager


class HostPager:
    """What ``GpuExtend`` asks of a ``DevicePager``, by ``CsrPager``, which gives the same layout on the CPU."""

    row_entries = None

    def __init__(
        self,
        page_size: int,
        *,
        max_rows: int,
        max_tokens: int,
        num_pages: int,
        cost_model: CostModel | None = None,
        sharing: bool = True,
    ) -> None:
        self.page_size, self.max_rows, self.table_stride = page_size, max_rows, -(-max_tokens // page_size)
        self._pager = CsrPager(page_size, num_pages=num_pages, cost_model=cost_model, sharing=sharing)
        self._layout: DeviceLayout | None = None

    def snapshot(self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        x = self._pager.step(req_to_token, req_pool_indices, seq_lens)
        assert x.status[0] == 0, x.status
        leaders = x.row_order[x.segment_rows[:, 0].long()]
        blocks = x.segment_positions[:, 0] // self.page_size
        pages = (req_to_token[req_pool_indices.long()] // self.page_size)[:, :: self.page_size]

        def padded(values: torch.Tensor) -> torch.Tensor:
            """One entry more, as arrays at full capacity are never empty."""
            return torch.cat([values.int(), values.new_zeros((1, *values.shape[1:]), dtype=torch.int32)])

        self._layout = DeviceLayout(
            page_size=self.page_size,
            sizes=torch.tensor([x.num_segments, 0, 0, x.row_segments.numel(), 0, 0, 0, 0], dtype=torch.int32),
            status=torch.zeros(4, dtype=torch.int32),
            row_order=x.row_order,
            segment_rows=padded(x.segment_rows),
            segment_positions=padded(x.segment_positions),
            page_indptr=x.page_indptr,
            row_indptr=x.row_indptr,
            row_segments=padded(x.row_segments),
            segment_entries=padded(padded(leaders * self.table_stride + blocks)),
            table=padded(pages.reshape(-1)),
            page_indices=None,
            run_indptr=None,
            runs=None,
            staged_pages=None,
        )

    def build(self) -> None:
        """The snapshot has done it."""

    def layout(self, num_rows: int) -> DeviceLayout | None:
        return self._layout
