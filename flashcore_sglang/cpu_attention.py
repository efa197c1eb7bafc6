"""Attention of a step in PyTorch: the pager of the CPU, then ``ops``. Serves where no kernel of csrc/attention does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashcore_sglang import ops
from flashcore_sglang.layout import CsrLayout, CsrPager
from flashcore_sglang.reach import Reach
from flashcore_sglang.requirements import LayerFacts
from flashcore_sglang.step import Drafts, Step

Kind = tuple[Reach, bool]


@dataclass(frozen=True)
class CpuStep:
    """A planned step.

    Attributes:
        num_tokens: its queries.
        layout:     of the full pool; layers with a window read parts of its segments.
        plans:      by ``kind_of`` a layer.
    """

    num_tokens: int
    layout: CsrLayout
    plans: dict[Kind, ops.AttentionPlan]


def kind_of(layer: LayerFacts) -> Kind:
    """What the plan of a layer depends on: how far back it sees, and whether it is in the pool of such layers."""
    return layer.reach, layer.in_window_pool


class CpuAttention:
    """Plans and runs steps in PyTorch.

    Args:
        layers:    of the model.
        page_size, num_pages: of the KV pool.
        sharing:   False: every request reads its own pages.
        report:    called with ``CsrLayout.status`` where a step's tables are wrong.
    """

    def __init__(
        self,
        layers: tuple[LayerFacts, ...],
        *,
        page_size: int,
        num_pages: int,
        sharing: bool,
        report: Callable[[tuple[int, int, int, int]], None],
    ) -> None:
        self._kinds = sorted({kind_of(x) for x in layers})
        self._kind_of_layer = {x.layer_id: kind_of(x) for x in layers}
        self._pager = CsrPager(page_size, num_pages=num_pages, sharing=sharing)
        self._report = report

    def plan(self, step: Step, req_to_token: torch.Tensor, slot_map: torch.Tensor | None) -> CpuStep:
        """Copies what the step reads of SGLang's tables, and says what every kind of layer reads.

        ``slot_map``: [slots] the slot of the window layers' pool for each slot of ``req_to_token``; None: no such pool.
        """
        seq_lens = step.seq_lens.cpu()
        layout = self._page(req_to_token, step.req_pool_indices, seq_lens)
        if layout.status[0]:
            self._report(layout.status)
            seq_lens = _readable_lens(layout, seq_lens)
        q_lens = None if step.q_lens is None else step.q_lens.cpu()
        mask = None if step.custom_mask is None else step.custom_mask.cpu()
        plans = {
            (reach, translated): ops.plan(
                layout,
                seq_lens,
                q_lens,
                reach=reach,
                custom_mask=mask,
                slot_map=slot_map if translated else None,
            )
            for reach, translated in self._kinds
        }
        return CpuStep(step.num_tokens, layout, plans)

    def plan_drafts(self, drafts: Drafts, req_to_token: torch.Tensor) -> list[CpuStep]:
        """As ``plan``, for each step of a draft model. Layers in a pool of windows are not served."""
        table, rows = drafts.table(req_to_token, self._pager.page_size)
        return [self.plan(Step(rows, lens, None, drafts.num_rows, 1), table, None) for lens in drafts.lens()]

    def attend(
        self,
        step: CpuStep,
        layer_id: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        **options: Any,
    ) -> None:
        """One layer of the step, into ``out``; arguments and errors as ``ops.attend``."""
        ops.attend(q, k_cache, v_cache, step.plans[self._kind_of_layer[layer_id]], out=out, **options)

    def _page(self, table: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> CsrLayout:
        if table.device.type == "cpu":
            return self._pager.step(table, req_pool_indices, seq_lens)
        # One copy of the rows in question; entry 0 of the copy stands for SGLang's padding row.
        width = int(seq_lens.max()) if seq_lens.numel() else 0
        wanted = table[req_pool_indices.clamp(0, table.shape[0] - 1), :width]
        rows = torch.cat([table[:1, :width], wanted]).cpu()
        index = torch.arange(1, len(rows)) * (req_pool_indices.cpu() != 0)
        return self._pager.step(rows, index, seq_lens)


def _readable_lens(layout: CsrLayout, seq_lens: torch.Tensor) -> torch.Tensor:
    """Ends of the ranges that the layout covers, where the pager cut some."""
    lens = torch.zeros_like(seq_lens)
    for row in range(layout.num_rows):
        segments = layout.row_segments[layout.row_indptr[row] : layout.row_indptr[row + 1]]
        if segments.numel():
            lens[row] = layout.segment_positions[segments[-1], 1]
    return lens
