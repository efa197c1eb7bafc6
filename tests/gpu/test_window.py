"""Layers with a sliding window, and drafts, as the backend runs them: captured, in pools of their own."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from unit.window_cases import check, check_mask, random_case

from flashcore_sglang import reference
from flashcore_sglang.device_pager import DevicePager
from flashcore_sglang.device_window import DeviceWindow
from flashcore_sglang.gpu_decode import GpuDecode
from flashcore_sglang.gpu_extend import GpuExtend, Visible
from flashcore_sglang.reach import Reach

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, CONTEXT = 8, 2, 1024
LENS = [700, 640, 1, 300, 33, 513, 128, 129]
SHAPE = {"heads": HEADS, "kv_heads": KV_HEADS}


class Case:
    """Requests over a pool of permuted slots, perhaps those of another pool; what no window reaches is NaN."""

    def __init__(self, page_size: int, window_left: int, head_dim: int, q_lens: list[int], translated: bool) -> None:
        self.page_size, self.q_lens = page_size, torch.tensor(q_lens, device="cuda")
        blocks, rows = CONTEXT // page_size, len(LENS)
        self.pages = rows * blocks + 1
        g = torch.Generator().manual_seed(page_size + window_left)
        ids = 1 + torch.randperm(rows * blocks, generator=g).view(rows, blocks)
        self.table = torch.zeros(rows + 1, CONTEXT, dtype=torch.int32)
        self.table[1:] = (ids[..., None] * page_size + torch.arange(page_size)).flatten(1).int()
        moved = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(self.pages - 1, generator=g)])
        slots = (moved[:, None] * page_size + torch.arange(page_size)).flatten()
        self.slot_map = slots.cuda() if translated else None
        self.read = slots[self.table.long()].int() if translated else self.table
        self.k, self.v = (
            torch.full((self.pages * page_size, KV_HEADS, head_dim), torch.nan, dtype=torch.bfloat16) for _ in range(2)
        )
        for row, (length, count) in enumerate(zip(LENS, q_lens, strict=True), start=1):
            seen = self.read[row, max(0, length - count - window_left) : length].long()
            for x in (self.k, self.v):
                x[seen] = torch.randn(len(seen), KV_HEADS, head_dim, generator=g).bfloat16()
        self.q = torch.randn(sum(q_lens), HEADS, head_dim, generator=g).bfloat16().cuda()
        self.lens = torch.tensor(LENS, device="cuda")
        self.indices = torch.arange(1, rows + 1, device="cuda")
        self.options = {"scale": head_dim**-0.5, "sinks": torch.linspace(-1, 2, HEADS).cuda()}

    def want(self, **options: object) -> torch.Tensor:
        return reference.extend(
            self.q.cpu(), self.k.nan_to_num(0), self.v.nan_to_num(0), self.read, self.indices.cpu(), self.lens.cpu(),
            self.q_lens.cpu(), page_size=self.page_size, scale=self.options["scale"],
            sinks=self.options["sinks"].cpu(), **options,
        )  # fmt: skip


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu().double(), want, atol=8e-3, rtol=2e-2)


def captured(steps) -> torch.cuda.CUDAGraph:
    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph


@pytest.mark.parametrize("seed", range(200))
def test_tables_of_any_step_are_those_wanted(seed):
    case = random_case(seed, max_requests=200 if seed % 8 == 0 else 24, max_tokens=4000 if seed % 5 == 0 else 400)
    window = case.window("cuda")
    case.snapshot(window, "cuda")
    check(case, window)
    if len(case.wanted()) <= window.num_rows:
        check_mask(case, window, "cuda")


def test_tables_of_the_largest_batch_are_those_of_the_cpu():
    requests, tokens, left = 1024, 5000, 4096
    g = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2**20, (requests + 1, tokens), generator=g, dtype=torch.int32)
    lens, rows = torch.randint(0, tokens + 1, (requests,), generator=g), torch.arange(1, requests + 1)
    slot_map = torch.randint(-1, 2**19, (2**20,), generator=g)
    got, want = (
        DeviceWindow(
            1, reach=Reach(left), max_rows=requests, max_queries=1, max_tokens=tokens, num_pages=2**19, device=device
        )
        for device in ("cuda", "cpu")
    )
    got.snapshot(table.cuda(), rows.cuda(), lens.cuda(), slot_map=slot_map.cuda())
    want.snapshot(table, rows, lens, slot_map=slot_map)
    assert torch.equal(got._fields.cpu(), want._fields)
    assert torch.equal(got.layout(requests).table.cpu(), want.layout(requests).table)


@pytest.mark.parametrize("reach", [Reach(63), Reach(chunk=64)], ids=str)
def test_steps_after_the_first_allocate_nothing(reach):
    window = DeviceWindow(
        16, reach=reach, max_rows=32, max_queries=1, max_tokens=CONTEXT, num_pages=99, max_extend=256, device="cuda"
    )
    table, four = torch.zeros(5, CONTEXT, dtype=torch.int32, device="cuda"), torch.arange(4, device="cuda")
    lens, q_lens = four + 500, torch.tensor([1, 400, 3, 1], device="cuda")

    def steps() -> None:
        window.snapshot(table, four, lens)
        window.snapshot(table, four, lens, q_lens=q_lens, num_tokens=405, max_queries=400, slot_map=four)

    steps()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    steps()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize(("head_dim", "translated"), [(64, True), (128, False), (128, True), (256, True)])
@pytest.mark.parametrize("window_left", [0, 127, 128, 400])
@pytest.mark.parametrize("page_size", [1, 64])
def test_captured_decode_with_a_window(page_size, window_left, head_dim, translated):
    case = Case(page_size, window_left, head_dim, [1] * len(LENS), translated)
    sizes = {"max_rows": 16, "max_tokens": CONTEXT, "num_pages": case.pages}
    window = DeviceWindow(page_size, reach=Reach(window_left), max_queries=1, device="cuda", **sizes)
    decode = GpuDecode(page_size=page_size, pager=window, head_dim=head_dim, **sizes, **SHAPE)
    k, v, table, out = case.k.cuda(), case.v.cuda(), case.table.cuda(), torch.empty_like(case.q)

    def snapshot(lens: torch.Tensor) -> None:
        window.snapshot(table, case.indices, lens, slot_map=case.slot_map)
        decode.use(len(LENS))

    def step() -> None:
        decode.plan()
        decode.attend(case.q, k, v, out, **case.options)

    snapshot(torch.ones_like(case.lens))  # as SGLang captures
    graph = captured(step)
    snapshot(case.lens)
    out.fill_(torch.nan)
    graph.replay()
    close(out, case.want(window_left=window_left))


@pytest.mark.parametrize(("head_dim", "translated"), [(64, True), (128, False), (128, True), (256, True)])
@pytest.mark.parametrize("window_left", [0, 127, 4096])
@pytest.mark.parametrize("page_size", [1, 64])
def test_extend_with_a_window(page_size, window_left, head_dim, translated):
    q_lens = [3, 200, 1, 300, 0, 129, 128, 2]
    case = Case(page_size, window_left, head_dim, q_lens, translated)
    sizes = {"max_rows": 16, "max_tokens": CONTEXT, "num_pages": case.pages}
    room = sum(q_lens) if translated else 0  # else it is made for the step
    window = DeviceWindow(
        page_size, reach=Reach(window_left), max_queries=1, max_extend=room, device="cuda", **sizes
    )  # fmt: skip
    extend = GpuExtend(window, head_dim=head_dim, max_tokens=1024, **SHAPE)
    window.snapshot(
        case.table.cuda(),
        case.indices,
        case.lens,
        q_lens=case.q_lens,
        num_tokens=sum(q_lens),
        max_queries=300,
        slot_map=case.slot_map,
    )
    extend.use(len(LENS))
    extend.plan(window.lens, window.q_lens, sum(q_lens), window_left=window_left)
    out = torch.full_like(case.q, torch.nan)
    extend.attend(case.q, case.k.cuda(), case.v.cuda(), out, **case.options)
    close(out, case.want(window_left=window_left))


@pytest.mark.parametrize("q_lens", [[1] * 8, [3, 200, 1, 300, 0, 129, 128, 2]], ids=["decode", "extend"])
@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("page_size", [1, 64])
def test_chunked_local_attention(page_size, chunk, q_lens):
    case = Case(page_size, 4096, 128, q_lens, False)
    sizes = {"max_rows": 32, "max_tokens": CONTEXT, "num_pages": case.pages}
    window = DeviceWindow(page_size, reach=Reach(chunk=chunk), max_queries=1, device="cuda", **sizes)
    extend = GpuExtend(window, head_dim=128, max_tokens=1024, **SHAPE)
    tokens = sum(q_lens)
    window.snapshot(
        case.table.cuda(), case.indices, case.lens, q_lens=case.q_lens, num_tokens=tokens, max_queries=max(q_lens)
    )
    extend.use(window.num_rows)
    extend.plan(window.lens, window.q_lens, tokens)
    out = torch.full_like(case.q, torch.nan)
    extend.attend(case.q, case.k.cuda(), case.v.cuda(), out, **case.options)
    close(out, case.want(chunk=chunk))


@pytest.mark.parametrize("window_left", [None, 1, 100])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_captured_verification(page_size, tree, window_left):
    drafts, lens = 4, [700, 640, 5, 300, 33, 513, 128, 129]
    case = Case(page_size, 4096, 128, [drafts] * len(LENS), False)
    case.lens = torch.tensor(lens, device="cuda")
    case.table[2, :512] = case.table[1, :512]
    for x in (case.k, case.v):
        x[x.isnan()] = 0  # lengths differ from those that the case was made for
    sizes = {"max_rows": 16, "max_tokens": CONTEXT, "num_pages": case.pages}
    if window_left is None:
        pager = DevicePager(page_size, **sizes)
    else:
        pager = DeviceWindow(page_size, reach=Reach(window_left), max_queries=drafts, device="cuda", **sizes)
        pager.make_mask(16)
    extend = GpuExtend(pager, head_dim=128, max_tokens=16 * drafts, **SHAPE)
    k, v, table, out = case.k.cuda(), case.v.cuda(), case.table.cuda(), torch.empty_like(case.q)
    lens_of_step, mask = torch.full_like(case.lens, drafts), torch.ones(2**16, dtype=torch.bool, device="cuda")
    visible = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    full = torch.cat([torch.cat([torch.ones(drafts, n - drafts).bool(), visible], 1).flatten() for n in lens])

    def snapshot() -> None:
        if isinstance(pager, DevicePager):
            pager.snapshot(table, case.indices, lens_of_step)
        else:
            tokens = drafts * len(LENS)
            pager.snapshot(table, case.indices, lens_of_step, q_lens=case.q_lens, num_tokens=tokens, max_queries=drafts)
            pager.take_mask(mask)
        extend.use(len(LENS))

    def step() -> None:
        windowed = isinstance(pager, DeviceWindow)
        extend.plan(
            pager.lens if windowed else lens_of_step,
            case.q_lens,
            drafts * len(LENS),
            visible=Visible.MASKED if tree else Visible.CAUSAL,
            window_left=window_left if windowed else -1,
        )
        seen = (pager.mask if windowed else mask) if tree else None
        extend.attend(case.q, k, v, out, custom_mask=seen, **case.options)

    snapshot()
    graph = captured(step)
    lens_of_step.copy_(case.lens)
    mask[: len(full)] = full.cuda()
    snapshot()
    out.fill_(torch.nan)
    graph.replay()
    close(out, case.want(custom_mask=full if tree else None, window_left=-1 if window_left is None else window_left))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_extend_gives_the_same_bits_alone_together_and_in_chunks(head_dim):
    q_lens = [400, 640, 1, 300, 33, 513, 128, 129]
    case = Case(1, 4096, head_dim, q_lens, False)
    k, v, table = case.k.cuda(), case.v.cuda(), case.table.cuda()
    pager = DevicePager(1, max_rows=16, max_tokens=CONTEXT, num_pages=case.pages, sharing=False)
    extend = GpuExtend(pager, head_dim=head_dim, max_tokens=4096, deterministic=True, **SHAPE)

    def run(rows: slice, lens: torch.Tensor, q_lens: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        extend.snapshot(table, case.indices[rows], lens)
        extend.plan(lens, q_lens, len(q))
        return extend.attend(q, k, v, torch.empty_like(q), **case.options)

    together = run(slice(None), case.lens, case.q_lens, case.q)
    at = 0
    for row, count in enumerate(q_lens):
        q, lens = case.q[at : at + count], case.lens[row : row + 1]
        want, one = together[at : at + count], slice(row, row + 1)
        assert torch.equal(run(one, lens, case.q_lens[one], q), want)
        first = count // 3  # the request in two chunks
        if first:
            head = torch.tensor([first], device="cuda")
            assert torch.equal(run(one, lens - (count - first), head, q[:first]), want[:first])
            assert torch.equal(run(one, lens, case.q_lens[one] - head, q[first:]), want[first:])
        at += count
