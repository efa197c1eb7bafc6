"""Snapshot, pager, schedule, attention and merge together, as the backend runs them."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from flashcore_sglang import reference
from flashcore_sglang.gpu_decode import GpuDecode

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, SLOTS, CONTEXT = 32, 8, 128, 40_000, 4096


class Case:
    """Requests over one pool; every slot that none of them owns holds NaN."""

    def __init__(self, page_size: int, max_rows: int = 64, deterministic: bool = False) -> None:
        self.page_size = page_size
        self.table = torch.zeros(max_rows + 1, CONTEXT, dtype=torch.int32)
        self.k, self.v = (torch.full((SLOTS, KV_HEADS, DIM), torch.nan, dtype=torch.bfloat16) for _ in range(2))
        self.decode = GpuDecode(
            page_size=page_size,
            num_pages=SLOTS // page_size,
            max_rows=max_rows,
            max_tokens=CONTEXT,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            deterministic=deterministic,
        )
        self.free = page_size

    def fill(self, groups: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for (requests, shared, own) tokens of each group; returns their pool indices and lengths."""
        indices, lens = [], []
        for requests, shared, own in groups:
            shared = shared // self.page_size * self.page_size
            common = self.take(shared)
            for _ in range(requests):
                row = len(indices) + 1
                self.table[row, :shared] = common
                self.table[row, shared : shared + own] = self.take(own)
                indices.append(row)
                lens.append(shared + own)
        return torch.tensor(indices), torch.tensor(lens)

    def take(self, tokens: int) -> torch.Tensor:
        slots = torch.arange(self.free, self.free + tokens)
        self.k[slots] = torch.randn(tokens, KV_HEADS, DIM).to(torch.bfloat16)
        self.v[slots] = torch.randn(tokens, KV_HEADS, DIM).to(torch.bfloat16)
        self.free += -(-tokens // self.page_size) * self.page_size
        return slots.to(torch.int32)

    def want(self, q: torch.Tensor, indices: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(lens)
        return reference.extend(
            q, self.k, self.v, self.table, indices, lens, ones, page_size=self.page_size, scale=DIM**-0.5
        )


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.isfinite().all()
    error = (got.cpu().double() - want).norm() / want.norm()
    assert error < 5e-3, error


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_decode_equals_reference(page_size):
    torch.manual_seed(0)
    case = Case(page_size)
    indices, lens = case.fill([(12, 1500, 70), (5, 700, 33), (3, 0, 200), (1, 0, 1)])
    q = torch.randn(len(lens), HEADS, DIM).to(torch.bfloat16)
    case.decode.snapshot(case.table.cuda(), indices.cuda(), lens.cuda())
    case.decode.plan()
    got = case.decode.attend(
        q.cuda(), case.k.cuda(), case.v.cuda(), torch.full_like(q, torch.nan).cuda(), scale=DIM**-0.5
    )
    check(got, case.want(q, indices, lens))


def test_captured_step_follows_tables_that_change():
    """One graph; rows grow, are rewritten, and the padded rows of a smaller batch read SGLang's padding."""
    torch.manual_seed(1)
    case = Case(1)
    indices, lens = case.fill([(8, 1000, 40), (8, 300, 90)])
    table = case.table.cuda()
    rows, lengths = indices.cuda(), lens.cuda()
    q = torch.randn(16, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    case.k[0], case.v[0] = 0.0, 0.0
    k, v = case.k.cuda(), case.v.cuda()

    case.decode.snapshot(table, rows, lengths)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        case.decode.plan()
        case.decode.attend(q, k, v, out, scale=DIM**-0.5)
    for step in range(6):
        if step in (1, 2):  # every row grows by a token, interleaved
            for row in range(16):
                case.table[row + 1, int(lens[row])] = int(case.take(1))
            lens += 1
        if step == 3:  # a row passes to another request that shares the other prefix
            case.table[1, :300] = case.table[16, :300]
            lens[0] = 350
        if step == 4:
            indices = indices.flip(0)
            lens = lens.flip(0)
        if step == 5:  # padding
            indices[12:], lens[12:] = 0, 1
        table.copy_(case.table)
        rows.copy_(indices)
        lengths.copy_(lens)
        k.copy_(case.k)
        v.copy_(case.v)
        q.normal_()
        case.decode.snapshot(table, rows, lengths)
        out.fill_(torch.nan)
        graph.replay()
        check(out, case.want(q.cpu(), indices, lens))
        replayed = out.clone()
        case.decode.plan()
        case.decode.attend(q, k, v, out, scale=DIM**-0.5)
        assert torch.equal(out, replayed), "eager and replay differ"


def test_deterministic_result_does_not_depend_on_the_batch():
    """Each request alone, in the full batch and in half of it, bit for bit; and right."""
    torch.manual_seed(2)
    case = Case(1, deterministic=True)
    indices, lens = case.fill([(12, 1500, 70), (5, 700, 33), (3, 0, 3000), (1, 0, 1)])
    q = torch.randn(len(lens), HEADS, DIM).to(torch.bfloat16).cuda()
    table, k, v = case.table.cuda(), case.k.cuda(), case.v.cuda()

    def decode(rows: torch.Tensor) -> torch.Tensor:
        case.decode.snapshot(table, indices[rows].cuda(), lens[rows].cuda())
        case.decode.plan()
        mine = q[rows.cuda()]
        return case.decode.attend(mine, k, v, torch.full_like(mine, torch.nan), scale=DIM**-0.5)

    everything = torch.arange(len(lens))
    together = decode(everything)
    check(together, case.want(q.cpu(), indices, lens))
    half = everything[::2]
    assert torch.equal(decode(half), together[::2])
    for row in everything:
        assert torch.equal(decode(row[None]), together[row : row + 1]), int(lens[row])
