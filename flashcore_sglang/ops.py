"""Attention on the CSR layout in PyTorch, on any device: the path that serves where no kernel of csrc/attention does.

Each segment's K and V are taken once for all the queries that read them; partial results are merged by
log-sum-exp. What depends on the batch alone is planned once per step (``plan``), and used by every layer (``attend``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from flashcore_sglang.layout import CsrLayout
from flashcore_sglang.reach import EVERYTHING, Reach

_SHORT_TOKENS = 256
"""Segments of one query and at most this length are computed together: copying them costs less than calls for each."""
_MAX_SCORES = 1 << 21
"""Scores held at a time: 8 MiB of fp32, so that softmax works in cache."""


@dataclass(frozen=True)
class SegmentRead:
    """What one segment means for the queries of a step.

    Attributes:
        slots:     slice of the pool if the segment is one run, else [length] int64.
        tokens:    slice of the query tokens if they are consecutive, else [n] int64: those that see any of the segment.
        positions: [n] int64 position of each of these tokens; None: all see the whole segment.
        begin:     first position of the segment.
        length:    its tokens.
        reach:     how far back the tokens see.
        visible:   [n, length] bool in place of the causal rule: a tree of drafts; None: causal.
    """

    slots: slice | torch.Tensor
    tokens: slice | torch.Tensor
    positions: torch.Tensor | None
    begin: int
    length: int
    reach: Reach = EVERYTHING
    visible: torch.Tensor | None = None

    def keys_of(self, tile: slice) -> tuple[int, int]:
        """Range of the segment's keys outside of which the queries ``tile`` see nothing."""
        if self.positions is None or self.visible is not None:
            return 0, self.length
        positions = self.positions[tile]
        begin = max(0, self.reach.begin(int(positions.min())) - self.begin)
        return begin, min(self.length, int(positions.max()) + 1 - self.begin)

    def hidden(self, tile: slice, keys: tuple[int, int], device: torch.device) -> torch.Tensor | None:
        """[n, keys] bool, what the queries ``tile`` do not see; None: nothing."""
        if self.visible is not None:
            return ~self.visible[tile, keys[0] : keys[1]].to(device)
        if self.positions is None:
            return None
        key = torch.arange(self.begin + keys[0], self.begin + keys[1], device=device)[None, :]
        position = self.positions[tile].to(device)[:, None]
        hidden = key > position
        return hidden if self.reach.everything else hidden | (key < self.reach.begin(position))


@dataclass(frozen=True)
class ShortReads:
    """Segments of about the same length, each read whole by one query of its own: what decode leaves of a request.

    Attributes:
        slots:   [n, length] int64, padded with the segment's own first slot.
        tokens:  [n] int64, the query of each segment.
        lengths: [n] int64.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """The reads of a step: segments in the order of the layout, then the short ones."""

    num_tokens: int
    reads: list[SegmentRead]
    short: list[ShortReads]


def plan(
    layout: CsrLayout,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor | None = None,
    *,
    reach: Reach = EVERYTHING,
    custom_mask: torch.Tensor | None = None,
    slot_map: torch.Tensor | None = None,
) -> AttentionPlan:
    """Queries of every segment: the last ``q_lens`` tokens of each row, causal.

    Args:
        layout:   complete: nothing staged.
        seq_lens: [B] CPU, end of each row's range.
        q_lens:   [B] CPU, queries of each row; None: one each (decode). Rows without tokens have no keys: zeros.
        reach:    how far back the queries see. Segments are read from the first position on that one of theirs sees.
        custom_mask: [sum of q_lens * seq_lens] CPU bool, in place of the causal rule: for each row its queries by its
                  positions; True is seen, as far as ``reach`` goes.
        slot_map: [slots] the slot that stands for each slot of the layout, in another pool; None: itself.

    Raises ValueError if the layout is incomplete or the vectors do not fit it.
    """
    if not layout.is_complete:
        raise ValueError(
            f"layout: want every page resident, got {layout.staged_pages.numel()} staged pages, first "
            f"{layout.staged_pages[0].item()}; bring them in and build the layout again"
        )
    lens = seq_lens.tolist()
    counts = [1] * len(lens) if q_lens is None else q_lens.tolist()
    for name, values in (("seq_lens", lens), ("q_lens", counts)):
        if len(values) != layout.num_rows:
            raise ValueError(f"{name}: want {layout.num_rows} entries, one per row, got {len(values)}")
    queries = _Queries(lens, counts, reach, custom_mask)
    order, indptr = layout.row_order.tolist(), layout.run_indptr.tolist()
    reads = []
    for i, ((row_begin, row_end), (begin, end)) in enumerate(
        zip(layout.segment_rows.tolist(), layout.segment_positions.tolist(), strict=True)
    ):
        read = queries.read(order[row_begin:row_end], begin, end, _as_index(layout.runs[indptr[i] : indptr[i + 1]]))
        if read is not None:
            reads.append(read if slot_map is None else replace(read, slots=_map_slots(read.slots, slot_map)))
    return AttentionPlan(queries.first_token[-1], *_put_short_together(reads))


class _Queries:
    """The query tokens of a step, row after row, and what they see."""

    def __init__(self, lens: list[int], counts: list[int], reach: Reach, custom_mask: torch.Tensor | None) -> None:
        if custom_mask is not None and reach.ahead:
            raise ValueError("custom_mask: want a decoder's layers, got an encoder's, which see everything")
        self.lens, self.counts, self.reach, self.mask = lens, counts, reach, custom_mask
        self.first_token = [0, *itertools.accumulate(counts)]
        self._first_mask = [0, *itertools.accumulate(c * n for c, n in zip(counts, lens, strict=True))]

    def read(self, rows: list[int], begin: int, end: int, slots: slice | torch.Tensor) -> SegmentRead | None:
        """The read of a segment by those queries of ``rows`` that see any of it; None: none does."""
        seen: dict[int, tuple[int, int]] = {}  # of a row's queries
        for row in rows:
            first, count = self.lens[row] - self.counts[row], self.counts[row]
            # Queries before the segment see nothing of it, unless a mask says so; nor do those that begin behind it.
            skipped = max(0, begin - first) if self.mask is None and not self.reach.ahead else 0
            stop = min(count, last - first) if (last := self.reach.stop(end)) is not None else count
            if skipped < stop:
                seen[row] = skipped, stop
        if not seen:
            return None
        tokens = [self.first_token[row] + i for row, (skipped, stop) in seen.items() for i in range(skipped, stop)]
        positions = torch.tensor(
            [
                self.lens[row] - self.counts[row] + i
                for row, (skipped, stop) in seen.items()
                for i in range(skipped, stop)
            ]
        )
        below = max(0, self.reach.begin(int(positions.min())) - begin)  # tokens that none of the queries sees
        if below:
            begin += below
            slots = slice(slots.start + below, slots.stop) if isinstance(slots, slice) else slots[below:]
        masked = int(positions.min()) < end - 1 or self.reach.begin(int(positions.max())) > begin
        return SegmentRead(
            slots=slots,
            tokens=_as_slice(tokens),
            positions=positions if masked and not self.reach.ahead else None,
            begin=begin,
            length=end - begin,
            reach=self.reach,
            visible=self._visible(seen, positions, begin, end),
        )

    def _visible(
        self, seen: dict[int, tuple[int, int]], positions: torch.Tensor, begin: int, end: int
    ) -> torch.Tensor | None:
        """[queries, end - begin] of the custom mask; None: there is none, or it hides nothing here."""
        if self.mask is None or all(end <= self.lens[row] - self.counts[row] for row in seen):
            return None
        parts = []
        for row, (skipped, stop) in seen.items():
            mask = self.mask[self._first_mask[row] : self._first_mask[row + 1]].view(self.counts[row], self.lens[row])
            parts.append(mask[skipped:stop, begin:end].bool())
        return torch.cat(parts) & (torch.arange(begin, end) >= self.reach.begin(positions)[:, None])


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step's queries over their paged KV cache; defined by ``reference.extend``.

    Args:
        q:       [T, H, D] float32, bfloat16 or float16, in the order of the plan.
        k_cache: [slots, G, D], token-major; H is a multiple of G. float8_e4m3fn too.
        v_cache: [slots, G, Dv].
        k_scale, v_scale: what the cached values are to be multiplied with: a number, [1] or [G]; None: 1.
        plan:    from ``plan``, for these requests; the same for every layer.
        scale:   multiplies q.k before the softmax (usually ``D ** -0.5``).
        logit_cap: s <- cap * tanh(s / cap); 0 is none.
        sinks:   [H], the logit of a key without a value; None: no sinks.
        out:     [T, H, Dv], written and returned; allocated if None.

    Softmax and sums are float32. A query that sees nothing gives zeros. Raises ValueError for shapes that do not fit.
    """
    num_tokens, heads, _ = q.shape
    groups, v_dim = k_cache.shape[1], v_cache.shape[2]
    if heads % groups:
        raise ValueError(f"q: want a multiple of {groups} heads, the heads of k_cache, got {heads}")
    if num_tokens != plan.num_tokens:
        raise ValueError(f"q: want {plan.num_tokens} tokens, those of the plan, got {num_tokens}")
    acc = torch.zeros(num_tokens, heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((num_tokens, heads), -torch.inf, device=q.device)
    scaled = q.float() * scale * _of_heads(k_scale, heads)
    for read in plan.reads:
        slots = read.slots if isinstance(read.slots, slice) else read.slots.to(q.device)
        keys = k_cache[slots].float().permute(1, 2, 0)  # [G, D, L]
        values = v_cache[slots].float().transpose(0, 1)  # [G, L, Dv]
        _attend_segment(scaled, keys, values, read, logit_cap, acc, lse)
    for short in plan.short:
        _attend_short(scaled, k_cache, v_cache, short, logit_cap, acc, lse)
    if sinks is not None:
        acc *= torch.sigmoid(lse - sinks.float())[..., None]
    acc *= _of_heads(v_scale, heads)
    if out is None:
        return acc.to(q.dtype)
    return out.copy_(acc)


def _of_heads(scale: torch.Tensor | float | None, heads: int) -> torch.Tensor | float:
    """A scale of KV heads as a factor of [T, H, D]."""
    if not isinstance(scale, torch.Tensor):
        return 1.0 if scale is None else scale
    return scale.float().flatten().repeat_interleave(heads // scale.numel() if scale.numel() > 1 else 1).view(-1, 1)


def _attend_segment(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    read: SegmentRead,
    logit_cap: float,
    acc: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merges one segment into ``acc`` [T, H, Dv] and ``lse`` [T, H], a tile of queries at a time."""
    q_tile = max(1, _MAX_SCORES // (q.shape[1] * read.length))
    count = read.tokens.stop - read.tokens.start if isinstance(read.tokens, slice) else read.tokens.numel()
    for first in range(0, count, q_tile):
        tile = slice(first, min(first + q_tile, count))
        if isinstance(read.tokens, slice):
            tokens: slice | torch.Tensor = slice(read.tokens.start + tile.start, read.tokens.start + tile.stop)
        else:
            tokens = read.tokens[tile]
        seen = read.keys_of(tile)
        partial, partial_lse = _softmax_product(
            q[tokens],
            keys[:, :, seen[0] : seen[1]],
            values[:, seen[0] : seen[1]],
            read.hidden(tile, seen, q.device),
            logit_cap,
        )
        _merge(tokens, partial, partial_lse, acc, lse)


def _attend_short(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    read: ShortReads,
    logit_cap: float,
    acc: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merges segments of one query each into ``acc`` and ``lse``."""
    slots, tokens, lengths = read.slots.to(q.device), read.tokens.to(q.device), read.lengths.to(q.device)
    count, length = slots.shape
    heads, groups = q.shape[1], k_cache.shape[1]
    rows = q[tokens].view(count * groups, heads // groups, -1)
    s = torch.bmm(rows, k_cache[slots].float().permute(0, 2, 3, 1).flatten(0, 1))
    _cap(s, logit_cap)
    hidden = torch.arange(length, device=q.device) >= lengths[:, None]
    s.view(count, groups, -1, length).masked_fill_(hidden[:, None, None, :], -torch.inf)
    partial_lse = torch.logsumexp(s, dim=2)
    p = s.sub_(partial_lse[:, :, None]).exp_()
    partial = torch.bmm(p, v_cache[slots].float().transpose(1, 2).flatten(0, 1))
    _merge(tokens, partial.view(count, heads, -1), partial_lse.view(count, heads), acc, lse)


def _cap(scores: torch.Tensor, logit_cap: float) -> None:
    if logit_cap > 0:
        scores.div_(logit_cap).tanh_().mul_(logit_cap)


def _merge(
    tokens: slice | torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor, acc: torch.Tensor, lse: torch.Tensor
) -> None:
    """Adds [n, H, Dv] results over other keys, with their [n, H] lse, to those of ``tokens``, which differ."""
    old = lse[tokens]
    new = torch.logaddexp(old, partial_lse)
    by = new.masked_fill(new == -torch.inf, 0.0)  # nothing seen so far: prevents (-inf) - (-inf)
    acc[tokens] = acc[tokens] * torch.exp(old - by)[..., None] + partial * torch.exp(partial_lse - by)[..., None]
    lse[tokens] = new


def _softmax_product(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor | None,
    logit_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, H, Dv] normalised result and [n, H] natural lse of [n, H, D] queries; 0 and -inf where all is ``hidden``.

    All query heads of a KV head go into one product.
    """
    num_tokens, heads, dim = q.shape
    groups, length = keys.shape[0], keys.shape[2]
    ratio = heads // groups
    rows = q.view(num_tokens, groups, ratio, dim).transpose(0, 1).reshape(groups, num_tokens * ratio, dim)
    s = torch.bmm(rows, keys)
    _cap(s, logit_cap)
    if hidden is not None:
        s.view(groups, num_tokens, ratio, length).masked_fill_(hidden[None, :, None, :], -torch.inf)
    top = s.amax(dim=2, keepdim=True)
    top = top.masked_fill_(top == -torch.inf, 0.0)  # a query that sees none of these keys
    p = s.sub_(top).exp_()
    total = p.sum(dim=2, keepdim=True)
    o = torch.bmm(p, values).div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    lse = (top + total.log()).view(groups, num_tokens, ratio).transpose(0, 1).reshape(num_tokens, heads)
    return o.view(groups, num_tokens, ratio, -1).transpose(0, 1).reshape(num_tokens, heads, -1), lse


def _put_short_together(reads: list[SegmentRead]) -> tuple[list[SegmentRead], list[ShortReads]]:
    """Takes out the short reads of one query, in groups where no length is twice another and no query comes twice."""
    groups: list[list[SegmentRead]] = []
    for read in sorted(reads, key=lambda r: r.length):
        single = isinstance(read.tokens, slice) and read.tokens.stop - read.tokens.start == 1
        masked = read.positions is not None or read.visible is not None
        if not single or masked or read.length > _SHORT_TOKENS:
            continue
        group = groups[-1] if groups else []
        if not group or read.length >= 2 * group[0].length or any(read.tokens == other.tokens for other in group):
            groups.append(group := [])
        group.append(read)
    groups = [group for group in groups if len(group) > 1]
    taken = {id(read) for group in groups for read in group}
    return [read for read in reads if id(read) not in taken], [_short_reads(group) for group in groups]


def _short_reads(group: list[SegmentRead]) -> ShortReads:
    rows = [r.slots if isinstance(r.slots, torch.Tensor) else torch.arange(r.slots.start, r.slots.stop) for r in group]
    slots = torch.stack([torch.cat([x, x[:1].expand(group[-1].length - len(x))]) for x in rows])
    tokens = torch.tensor([r.tokens.start for r in group if isinstance(r.tokens, slice)])
    return ShortReads(slots, tokens, torch.tensor([r.length for r in group]))


def _as_index(runs: torch.Tensor) -> slice | torch.Tensor:
    """Slots of [n, 2] (start, length) runs."""
    if runs.shape[0] == 1:
        start, length = runs[0].tolist()
        return slice(start, start + length)
    starts, lengths = runs.long().unbind(1)
    shift = starts - torch.cumsum(lengths, 0) + lengths
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()))


def _map_slots(slots: slice | torch.Tensor, slot_map: torch.Tensor) -> slice | torch.Tensor:
    """The slots that stand for ``slots``; a slice where they are consecutive. What is out of the map gives slot 0."""
    if isinstance(slots, slice):
        slots = torch.arange(slots.start, slots.stop)
    inside = slots < slot_map.numel()
    mapped = slot_map[torch.where(inside, slots, 0).to(slot_map.device)].long().cpu()
    mapped = torch.where(inside, mapped, 0).clamp_min(0)
    first = int(mapped[0])
    if torch.equal(mapped, torch.arange(first, first + mapped.numel())):
        return slice(first, first + mapped.numel())
    return mapped


def _as_slice(values: list[int]) -> slice | torch.Tensor:
    """Ascending consecutive integers as a slice, others as an index."""
    if values == list(range(values[0], values[0] + len(values))):
        return slice(values[0], values[-1] + 1)
    return torch.tensor(values)
