"""Batches of extends over a paged pool, and the kernels called on them, for the GPU tests and the benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashcore_sglang import reference
from flashcore_sglang.config import SHARE_ALWAYS, CostModel, GatherModel
from flashcore_sglang.device_pager import DevicePager
from flashcore_sglang.gpu_extend import PARTIAL_CAPACITY, GpuExtend, Visible

GATHER_ALWAYS = GatherModel(mebibytes=256, max_page_size=64, rows_scattered=1, rows_boxed=1, rows_converted=1)


@dataclass
class Batch:
    """``table`` [B + 1, W] on the CPU: slots of request r in row r + 1; row 0 is padding."""

    page_size: int
    num_pages: int
    table: torch.Tensor
    seq_lens: torch.Tensor
    q_lens: torch.Tensor

    @property
    def rows(self) -> int:
        return self.seq_lens.numel()

    @property
    def num_tokens(self) -> int:
        return int(self.q_lens.sum())

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def owned(self) -> torch.Tensor:
        """[num_slots] bool: the slots that some request owns."""
        owned = torch.zeros(self.num_slots, dtype=torch.bool)
        for r in range(self.rows):
            owned[self.table[r + 1, : int(self.seq_lens[r])].long()] = True
        return owned

    @property
    def indices(self) -> torch.Tensor:
        return torch.arange(1, self.rows + 1)


def batch(
    groups: list[tuple[int, list[tuple[int, int]]]], page_size: int = 1, order: str = "runs", seed: int = 0
) -> Batch:
    """Groups of (shared tokens, [(own cached tokens, new tokens) of each request]).

    ``order``: "runs" (pages of a request are consecutive), "interleaved" (the requests' own pages take turns) or
    "permuted".
    """
    shared_pages: list[list[int]] = []
    own_blocks: list[int] = []
    rows = []  # (group, shared, own, new)
    at = 1  # page 0 is padding
    for shared, requests in groups:
        assert shared % page_size == 0
        shared_pages.append(list(range(at, at + shared // page_size)))
        at += shared // page_size
        for own, new in requests:
            rows.append((len(shared_pages) - 1, shared, own, new))
            own_blocks.append(-(-(own + new) // page_size))
    own_pages: list[list[int]] = [[] for _ in rows]
    if order == "interleaved":
        for block in range(max(own_blocks, default=0)):
            for r, blocks in enumerate(own_blocks):
                if block < blocks:
                    own_pages[r].append(at)
                    at += 1
    else:
        for r, blocks in enumerate(own_blocks):
            own_pages[r] = list(range(at, at + blocks))
            at += blocks
    pages = [shared_pages[g] + own_pages[r] for r, (g, *_) in enumerate(rows)]
    table = torch.zeros(len(rows) + 1, max(1, max(map(len, pages))) * page_size, dtype=torch.int32)
    permutation = torch.arange(at, dtype=torch.int32)
    if order == "permuted":
        generator = torch.Generator().manual_seed(seed)
        permutation[1:] = 1 + torch.randperm(at - 1, generator=generator, dtype=torch.int32)
    for r, row in enumerate(pages):
        first = permutation[torch.tensor(row, dtype=torch.long)] * page_size
        slots = (first[:, None] + torch.arange(page_size, dtype=torch.int32)).flatten()
        table[r + 1, : slots.numel()] = slots
    seq_lens = torch.tensor([shared + own + new for _, shared, own, new in rows])
    return Batch(page_size, at, table, seq_lens, torch.tensor([new for *_, new in rows], dtype=torch.int32))


def pools(
    b: Batch, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V with NaN in every slot that no request owns."""
    k, v = (torch.randn(b.num_slots, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    owned = b.owned.to(device)
    k[~owned] = torch.nan
    v[~owned] = torch.nan
    return k, v


class Extend:
    """The kernels on one batch. ``pager_type``: of another device than a GPU, what takes ``DevicePager``'s place."""

    def __init__(
        self,
        b: Batch,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        visible: Visible = Visible.CAUSAL,
        window_left: int = -1,
        sharing: bool = True,
        cost_model: CostModel = SHARE_ALWAYS,
        gather: GatherModel | None = None,
        max_tokens: int | None = None,
        poison: bool = True,
        kv_dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        pager_type: Callable[..., Any] = DevicePager,
    ) -> None:
        self.poison = poison  # partial results and gathered K and V with NaN before each run
        self.b, self.visible, self.window_left = b, visible, window_left
        self.pager = pager_type(
            b.page_size,
            max_rows=b.rows,
            max_tokens=b.table.shape[1],
            num_pages=b.num_pages,
            sharing=sharing,
            cost_model=cost_model,
        )
        self.kernels = GpuExtend(
            self.pager,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_tokens=max_tokens or max(b.num_tokens, 1),
            kv_dtype=kv_dtype,
            gather=gather,
            device=device,
        )
        self.q_rows = 192 if head_dim == 64 else 128  # of a tile, at most
        self.seq_lens, self.q_lens = b.seq_lens.to(device), b.q_lens.to(device)
        self.kernels.snapshot(b.table.to(device), b.indices.to(device), self.seq_lens)

    def plan(self) -> None:
        self.kernels.plan(
            self.seq_lens, self.q_lens, self.b.num_tokens, visible=self.visible, window_left=self.window_left
        )

    def _header(self, word: int) -> int:
        """Of ``Header`` in csrc/attention/extend_params.h. Synchronises."""
        return int(self.kernels._workspace[:64].view(torch.int32)[word])

    @property
    def gathered_slots(self) -> int:
        """That the last plan copies K and V to. Synchronises."""
        return self._header(5)

    @property
    def tail_ranges(self) -> int:
        """That the last plan cuts what is left over of whole rounds into. Synchronises."""
        return self._header(8)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        if self.poison:
            partials = PARTIAL_CAPACITY * self.q_rows * (q.shape[2] + 1) * 4  # bytes, the last of the workspace
            self.kernels._workspace[-partials:].fill_(0xFF)
            self.kernels._gathered.fill_(0xFF)
        return self.kernels.attend(q, k, v, torch.full_like(q, torch.nan), **options)


def exact(e: Extend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """Float64, by the definition."""
    b = e.b
    return reference.extend(
        q, k, v, b.table, b.indices, b.seq_lens, b.q_lens, page_size=b.page_size,
        causal=e.visible == Visible.CAUSAL, window_left=e.window_left, **options,
    )  # fmt: skip


def assert_accurate(got: torch.Tensor, want: torch.Tensor) -> None:
    """Every element is finite; the error of all and of each (token, head) is what rounding of q's dtype explains."""
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"
    if got.numel() == 0:
        return
    unit = torch.finfo(got.dtype).eps
    error = (got.double() - want).norm(dim=2)
    size = want.norm(dim=2)
    worst = (error / (size + 1e-3 * size.mean() + 1e-30)).flatten()
    largest = [divmod(int(i), got.shape[1]) for i in error.flatten().argsort(descending=True)[:16]]
    assert error.norm() <= unit * want.norm(), (
        f"error {error.norm() / want.norm():.2e}, {unit:.1e} wanted; largest at (token, head) {largest}"
    )
    token, head = divmod(int(worst.argmax()), got.shape[1])
    assert worst.max() <= 4 * unit, f"error {worst.max():.2e} at token {token}, head {head}; {4 * unit:.1e} wanted"


def tree_mask(b: Batch, seed: int = 0) -> torch.Tensor:
    """[sum of q_lens * seq_lens] bool: the prefix, the token itself and its ancestors in a random tree."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for seq_len, q_len in zip(b.seq_lens.tolist(), b.q_lens.tolist(), strict=True):
        mask = torch.zeros(q_len, seq_len, dtype=torch.bool)
        mask[:, : seq_len - q_len] = True
        for i in range(q_len):
            if i:
                mask[i] |= mask[int(torch.randint(i, (1,), generator=generator))]
            mask[i, seq_len - q_len + i] = True
        parts.append(mask.flatten())
    return torch.cat(list(itertools.chain(parts, [torch.zeros(0, dtype=torch.bool)])))
