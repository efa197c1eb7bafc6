"""Attention of a step on a Hopper GPU: which kernels serve which layers, and the buffers that they share.

Layers that read everything share one pager; layers with windows or chunks of one size share one ``DeviceWindow``. Each
shape of heads has a workspace of its own. ``snapshot`` is the only reader of SGLang's tables and runs outside CUDA
graphs; ``plan`` and ``attend`` are captured.

The steps of a draft model run one after the other in one graph, which plans each before its first layer: its rows have
grown by a token. So they share all buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore_sglang.device_pager import MAX_ROWS, DevicePager
from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.gpu_decode import GpuDecode
from flashcore_sglang.gpu_extend import GpuExtend, Visible
from flashcore_sglang.reach import Reach
from flashcore_sglang.requirements import LayerFacts, ServingFacts
from flashcore_sglang.step import Drafts, Step

Kind = tuple[Reach, bool, int, int, int]


def kind_of(layer: LayerFacts) -> Kind:
    """Layers of one kind share a plan: how far back, whether in the pool of such layers, heads, KV heads, head dim."""
    return layer.reach, layer.in_window_pool, layer.num_q_heads, layer.num_kv_heads, layer.head_dim


@dataclass
class Kernels:
    """What serves the layers of one kind.

    Attributes:
        window: of its pages; None: they read everything.
        decode: one query per request. extend: new tokens; None: another backend serves them.
        verify: drafts, of a fixed size so that it can be captured; None: there are none.
    """

    window: DeviceWindow | None
    decode: GpuDecode
    extend: GpuExtend | None
    verify: GpuExtend | None

    def of(self, step: Step) -> GpuDecode | GpuExtend | None:
        if step.is_decode:
            return self.decode
        return self.verify if step.draft_tokens and self.verify else self.extend


class GpuAttention:
    """Plans and runs steps with the kernels of csrc/attention.

    Args:
        facts:      of the server.
        num_pages:  of the KV pool. window_pages: of the pool of layers with a window, if they have one.
        max_batch: rows of a batch. max_context: tokens of a row of SGLang's ``req_to_token``.
        branches:   of the drafts of a request that are decoded at a time; 1 where none are.
        max_extend: new tokens of a step that there is room for at first.
        sharing:    False: every request reads its own pages.
        device:     a Hopper GPU.

    Raises ValueError for sizes that are not served, RuntimeError if the library cannot be compiled.
    """

    def __init__(
        self,
        facts: ServingFacts,
        *,
        num_pages: int,
        window_pages: int,
        max_batch: int,
        max_context: int,
        max_extend: int,
        sharing: bool,
        device: torch.device | str,
        branches: int = 1,
    ) -> None:
        self.max_rows = min(MAX_ROWS, max_batch * branches)
        self._max_requests = min(MAX_ROWS, max_batch)
        self._facts, self._sharing, self._device = facts, sharing, device
        self._num_pages, self._window_pages = num_pages, window_pages
        self._max_tokens = min(max_context, num_pages * facts.page_size)
        self._max_extend, self._drafts = max_extend, facts.draft_tokens
        self._windows: dict[tuple[Reach, bool], DeviceWindow] = {}
        self._pager: DevicePager | None = None
        self._gathered: dict[tuple[int, int], torch.Tensor] = {}
        # Layers that read everything come first: theirs is the pager that statistics look at.
        self._kernels = {kind: self._make_kernels(kind) for kind in sorted({kind_of(x) for x in facts.layers})}
        self._of_layer = {x.layer_id: self._kernels[kind_of(x)] for x in facts.layers}
        ints = {"dtype": torch.int32, "device": device}
        self._lens, self._q_lens = (
            torch.zeros(self.max_rows, **ints),
            torch.full((self.max_rows,), self._drafts, **ints),
        )
        self._mask: torch.Tensor | None = None
        self._mask_rows = 0
        self._step_lens = torch.zeros(max(facts.draft_steps - 1, 0), self.max_rows, **ints)
        self.planned: GpuStep | None = None

    @property
    def full(self) -> GpuDecode | None:
        """Decode of the layers that read everything; None where all have a window."""
        return next((x.decode for x in self._kernels.values() if x.window is None), None)

    @property
    def mebibytes(self) -> float:
        """Device memory of all buffers."""
        total = self._pager.mebibytes if self._pager else 0.0
        total += sum(x.mebibytes for x in self._windows.values())
        for x in self._kernels.values():
            total += x.decode.workspace_mebibytes + sum(e.mebibytes for e in (x.extend, x.verify) if e)
        return total

    def serves(self, step: Step) -> bool:
        """Whether kernels take the step; else it is computed in PyTorch."""
        if step.num_rows > self.max_rows or not all(x.of(step) for x in self._kernels.values()):
            return False
        windows = () if step.is_decode else self._windows.values()
        return all(x.reach.rows(step.num_rows, step.num_tokens) <= x.max_rows for x in windows)

    def violation(self) -> tuple[int, int, int, int] | None:
        """As ``DevicePager.violation``."""
        return self._pager.violation() if self._pager else None

    def make_mask(self, max_rows: int) -> None:
        """Room for the masks of trees of drafts under CUDA graphs.

        Raises ValueError where they would take 2 GiB or more.
        """
        size = max_rows * self._drafts * (self._max_tokens + self._drafts)
        if size >= 2**31:
            raise ValueError(
                f"speculative decoding: want trees' masks below 2 GiB, got {size} bytes for {max_rows} requests of "
                f"{self._max_tokens} tokens; lower --cuda-graph-max-bs or --context-length, or set "
                "--speculative-eagle-topk 1"
            )
        self._mask, self._mask_rows = torch.ones(size, dtype=torch.bool, device=self._device), max_rows
        for window in self._windows.values():
            window.make_mask(max_rows)

    def take_mask(self, mask: torch.Tensor) -> None:
        """Copies the mask of a tree of drafts to where captured steps read it, if there are any."""
        if self._mask is not None:
            size = min(mask.numel(), self._mask.numel())  # SGLang may allocate more than the lengths take
            self._mask[:size] = mask[:size]
            for window in self._windows.values():
                window.take_mask(mask)

    def snapshot(self, step: Step, req_to_token: torch.Tensor, slot_map: torch.Tensor | None) -> GpuStep:
        """Copies what the step reads. Nothing is read on the host. Not for capture.

        ``slot_map``: [slots] the slot of the window layers' pool for each slot of ``req_to_token``; None: no such pool.
        """
        mask = step.custom_mask
        if step.draft_tokens:
            if step.draft_tokens != self._drafts:
                raise ValueError(
                    f"speculative decoding: want {self._drafts} drafts for every request, as at the start, got "
                    f"{step.draft_tokens}"
                )
            # What a graph reads must not move: SGLang's lengths leave the drafts out, its masks are new every step.
            self._lens[: step.num_rows] = step.seq_lens
            step = replace(step, seq_lens=self._lens[: step.num_rows], q_lens=self._q_lens[: step.num_rows])
        if self._pager:
            self._pager.snapshot(req_to_token, step.req_pool_indices, step.seq_lens)
        for (_, translated), window in self._windows.items():
            window.snapshot(
                req_to_token,
                step.req_pool_indices,
                step.seq_lens,
                q_lens=step.q_lens,
                num_tokens=step.num_tokens,
                max_queries=step.max_queries,
                slot_map=slot_map if translated else None,
            )
        if mask is not None and self._mask is not None and step.num_rows <= self._mask_rows:
            self.take_mask(mask)
            mask = self._mask
        elif mask is not None:
            for window in self._windows.values():
                window.take_mask(mask)
        for kernels in self._kernels.values():
            kernel = kernels.of(step)
            assert kernel is not None, "a step that is not served"
            kernel.use(kernels.window.num_rows if kernels.window else step.num_rows)
        return GpuStep(self, step, mask)

    def snapshot_drafts(self, drafts: Drafts, req_to_token: torch.Tensor) -> list[GpuDraftStep]:
        """Copies what all steps of a draft model read. Nothing is read on the host. Not for capture.

        Raises ValueError for more branches or steps than there is room for, and for layers with windows or chunks.
        """
        rows, most = drafts.num_rows, len(self._step_lens) + 1
        if rows > self.max_rows or drafts.steps > most:
            raise ValueError(
                f"speculative decoding: want at most {self.max_rows} branches of {most} drafts, got {rows} of "
                f"{drafts.steps}"
            )
        if self._pager is None or self._windows:
            raise ValueError("speculative decoding: want draft models without windows and chunks, got some")
        self._step_lens[: drafts.steps - 1, :rows] = drafts.lens().clamp_(0, self._max_tokens)
        self._pager.snapshot_drafts(
            req_to_token, drafts.req_pool_indices, drafts.seq_lens, drafts.branches, drafts.steps
        )
        for kernels in self._kernels.values():
            kernels.decode.use(rows)
        steps = (
            Step(drafts.req_pool_indices, lens[:rows], None, rows, 1) for lens in self._step_lens[: drafts.steps - 1]
        )
        return [GpuDraftStep(self, step, self._pager) for step in steps]

    def kernels(self) -> dict[Kind, Kernels]:
        return self._kernels

    def of_layer(self, layer_id: int) -> Kernels:
        return self._of_layer[layer_id]

    def _make_kernels(self, kind: Kind) -> Kernels:
        reach, translated, heads, kv_heads, head_dim = kind
        facts, kv_dtype = self._facts, getattr(torch, self._facts.kv_cache_dtype)
        window = None if reach.everything else self._window(reach, translated)
        decode = GpuDecode(
            page_size=facts.page_size,
            num_pages=self._num_pages,
            max_rows=self.max_rows,
            max_tokens=self._max_tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            kv_dtype=kv_dtype,
            sharing=self._sharing,
            deterministic=facts.deterministic,
            pager=window or self._pager,
            device=self._device,
        )
        if window is None:
            assert isinstance(decode.pager, DevicePager)
            self._pager = decode.pager

        def extend(max_tokens: int) -> GpuExtend:
            made = GpuExtend(
                decode.pager,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                max_tokens=max_tokens,
                kv_dtype=kv_dtype,
                deterministic=facts.deterministic,
                device=self._device,
                gathered=self._gathered.get((kv_heads, head_dim)),
            )
            self._gathered[kv_heads, head_dim] = made.gathered
            return made

        return Kernels(
            window,
            decode,
            extend(self._max_extend) if facts.serves_prefill else None,
            extend(self._max_requests * self._drafts) if self._drafts else None,
        )

    def _window(self, reach: Reach, translated: bool) -> DeviceWindow:
        key = reach, translated
        if key not in self._windows:
            new_tokens = max(self._max_requests * self._drafts, self._max_extend if self._facts.serves_prefill else 0)
            self._windows[key] = DeviceWindow(
                self._facts.page_size,
                reach=reach,
                max_rows=min(MAX_ROWS, max(self.max_rows, reach.rows(self._max_requests, new_tokens))),
                max_queries=max(1, self._drafts),
                max_tokens=self._max_tokens,
                num_pages=self._window_pages if translated else self._num_pages,
                max_extend=self._max_extend if self._facts.serves_prefill else 0,
                device=self._device,
            )
        return self._windows[key]


def _visible(reach: Reach, mask: torch.Tensor | None) -> Visible:
    if reach.ahead:
        return Visible.ALL
    return Visible.CAUSAL if mask is None else Visible.MASKED


class GpuStep:
    """A step whose tables are copied."""

    def __init__(self, attention: GpuAttention, step: Step, mask: torch.Tensor | None) -> None:
        self._attention, self._step, self._mask = attention, step, mask
        self.num_tokens = step.num_tokens

    def plan(self) -> None:
        """Segments and work lists, for all layers. Capturable."""
        self._attention.planned = self
        step = self._step
        for (reach, *_), kernels in self._attention.kernels().items():
            kernel, window = kernels.of(step), kernels.window
            if isinstance(kernel, GpuExtend):
                assert step.q_lens is not None
                kernel.plan(
                    window.lens if window else step.seq_lens,
                    window.q_lens if window else step.q_lens,
                    step.num_tokens,
                    visible=_visible(reach, self._mask),
                    window_left=reach.left,
                )
            elif kernel:
                kernel.plan()

    def attend(
        self,
        layer_id: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        **options: Any,
    ) -> None:
        """One layer, into ``out``; arguments and errors as ``GpuDecode.attend``. Capturable."""
        kernels = self._attention.of_layer(layer_id)
        kernel, mask = kernels.of(self._step), self._mask
        if isinstance(kernel, GpuExtend):
            if mask is not None and kernels.window:
                mask = kernels.window.mask
            kernel.attend(q, k_cache, v_cache, out, custom_mask=mask, **options)
        elif kernel:
            kernel.attend(q, k_cache, v_cache, out, **options)


class GpuDraftStep(GpuStep):
    """A step of a draft model, planned by its first layer if ``plan`` has not been called."""

    def __init__(self, attention: GpuAttention, step: Step, pager: DevicePager) -> None:
        super().__init__(attention, step, None)
        self._pager = pager

    def plan(self) -> None:
        """Segments and work lists, for all layers. Capturable."""
        lens = self._step.seq_lens
        self._pager.row_ends[: lens.numel()].copy_(lens)
        super().plan()

    def attend(self, *args: Any, **options: Any) -> None:
        """As ``GpuStep.attend``."""
        if self._attention.planned is not self:
            self.plan()
        super().attend(*args, **options)
