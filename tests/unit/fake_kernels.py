"""Stand-ins for what runs on a GPU, which compute the definition from the tables that they are given.

They show that a step's tables, lengths and masks go to the kernels of the right layers; tests/gpu shows what those make
of them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flashcore_sglang import gpu_attention, reference
from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.gpu_extend import Visible
from flashcore_sglang.step import Drafts


class FakePager:
    """Of ``DevicePager``: the snapshots."""

    mebibytes = 1.0

    def __init__(self, page_size: int) -> None:
        self.page_size, self.rows, self.row_ends = page_size, [], torch.zeros(1024, dtype=torch.int32)

    def snapshot(self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        self.rows = [req_to_token[i, :n].long() for i, n in zip(req_pool_indices, seq_lens, strict=True)]
        self.row_ends[: len(seq_lens)] = seq_lens

    def snapshot_drafts(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        branches: int,
        steps: int,
    ) -> None:
        drafts = Drafts(req_pool_indices, seq_lens, branches, steps)
        table, rows = drafts.table(req_to_token, self.page_size)
        self.snapshot(table, rows, drafts.lens()[-1])

    def layout(self, num_rows: int) -> SimpleNamespace:
        return SimpleNamespace(num_rows=num_rows)

    def violation(self) -> None:
        return None


def slots_of(pager: FakePager | DeviceWindow, row: int, num_rows: int) -> torch.Tensor:
    """Slots of a row, from position 0 on as its pager counts; -1 below what is read."""
    if isinstance(pager, FakePager):
        return pager.rows[row][: pager.row_ends[row]]
    layout, size = pager.layout(num_rows), pager.page_size
    begin, end = layout.segment_positions[row].tolist()
    position = torch.arange(end)
    slots = layout.table[layout.segment_entries[row] + position // size].long() * size + position % size
    return torch.where(position < begin, -1, slots)


class FakeKernel:
    """What ``GpuDecode`` and ``GpuExtend`` have in common."""

    workspace_mebibytes = mebibytes = 1.0

    def __init__(self, pager: FakePager | DeviceWindow | None = None, *, page_size: int = 0, **options: object) -> None:
        self.pager, self.options, self.num_rows = pager or FakePager(page_size), options, 0
        self.planned: SimpleNamespace | None = None

    def use(self, num_rows: int) -> None:
        self.num_rows, self.planned = num_rows, None

    def plan(
        self,
        seq_lens: torch.Tensor | None = None,
        q_lens: torch.Tensor | None = None,
        num_tokens: int = 0,
        *,
        visible: Visible = Visible.CAUSAL,
        window_left: int = -1,
    ) -> None:
        slots = [slots_of(self.pager, row, self.num_rows) for row in range(self.num_rows)]
        if seq_lens is not None:
            assert seq_lens.tolist() == [len(x) for x in slots]
            assert q_lens is not None and int(q_lens.sum()) == num_tokens
        counts = [1] * self.num_rows if q_lens is None else q_lens.tolist()
        self.planned = SimpleNamespace(slots=slots, counts=counts, visible=visible, window_left=window_left)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        custom_mask: torch.Tensor | None = None,
        k_scale: object = None,
        v_scale: object = None,
        **options: object,
    ) -> None:
        assert k_scale is None and v_scale is None, "these caches are not scaled"
        plan, at, mask_at = self.planned, 0, 0
        assert plan is not None, "attend before plan"
        assert (custom_mask is not None) == (plan.visible is Visible.MASKED)
        for slots, count in zip(plan.slots, plan.counts, strict=True):
            keys, queries = torch.arange(len(slots)), torch.arange(len(slots) - count, len(slots))[:, None]
            causal = keys <= queries if plan.visible is not Visible.ALL else torch.ones(1, dtype=torch.bool)
            visible = causal & (slots >= 0).expand(count, -1)
            if custom_mask is not None:
                visible = custom_mask[mask_at : mask_at + visible.numel()].view_as(visible) & (slots >= 0)
                mask_at += visible.numel()
            if plan.window_left >= 0:
                visible = visible & (keys >= queries - plan.window_left)
            k, v = (x[slots.clamp_min(0)].masked_fill((slots < 0)[:, None, None], 0.0) for x in (k_cache, v_cache))
            out[at : at + count] = reference.attention(q[at : at + count], k, v, visible=visible, **options)[0]
            at += count


class FakeDecode(FakeKernel):
    """Of ``GpuDecode``."""


class FakeExtend(FakeKernel):
    """Of ``GpuExtend``."""

    gathered = torch.empty(0)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """``GpuAttention`` on a CPU."""
    monkeypatch.setattr(gpu_attention, "DevicePager", FakePager)
    monkeypatch.setattr(gpu_attention, "GpuDecode", FakeDecode)
    monkeypatch.setattr(gpu_attention, "GpuExtend", FakeExtend)
