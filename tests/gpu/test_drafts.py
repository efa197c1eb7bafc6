"""The steps of a draft model, all from one snapshot, as ``MultiStepDraftBackend`` runs them."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.draft_cases import draft_attention

from flashcore_sglang import reference
from flashcore_sglang.step import Drafts

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, SCALE, STEPS, REQUESTS, CONTEXT, SHARED = 8, 2, 128, 128**-0.5, 4, 4, 640, 256
SHAPES = [(1, 1), (4, 1), (1, 64), (3, 16), (2, 64)]


class Drafting:
    """Requests on a common prefix. Slots of drafts hold NaN until their step writes them."""

    def __init__(self, branches: int, page_size: int) -> None:
        self.branches, self.page_size = branches, page_size
        self.rows = REQUESTS * branches
        num_pages = (REQUESTS + 1) * CONTEXT // page_size
        self.attention = draft_attention(
            (HEADS, KV_HEADS, DIM), layers=2, branches=branches, steps=STEPS, page_size=page_size,
            num_pages=num_pages, max_batch=REQUESTS, max_context=CONTEXT,
        )  # fmt: skip
        slots = num_pages * page_size
        self.k, self.v = (torch.empty(slots, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.table = torch.zeros(REQUESTS + 1, CONTEXT, dtype=torch.int32, device="cuda")
        self.indices = torch.arange(1, REQUESTS + 1, device="cuda")
        self.lens = torch.zeros(REQUESTS, dtype=torch.int64, device="cuda")
        shape = (STEPS - 1, self.rows)
        self.q, self.out = (torch.empty(*shape, HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.new_k, self.new_v = (
            torch.empty(*shape, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        )
        self.loc = torch.zeros(shape, dtype=torch.int64, device="cuda")

    @property
    def drafts(self) -> Drafts:
        return Drafts(self.indices, self.lens, self.branches, STEPS)

    def fill(self, seed: int, padded: int = 0) -> None:
        """Another table, other lengths, and what the steps write. The last ``padded`` requests are padding."""
        generator = torch.Generator().manual_seed(seed)
        pages = torch.randperm(REQUESTS * CONTEXT // self.page_size, generator=generator) + 1
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).view(REQUESTS, -1).int()
        slots[1:, :SHARED] = slots[0, :SHARED]
        self.table[0], self.table[1:] = 0, slots.cuda()
        lens = SHARED + torch.randint(1, 100, (REQUESTS,), generator=generator)
        rows = torch.arange(1, REQUESTS + 1)
        if padded:
            rows[-padded:], lens[-padded:] = 0, 1
        self.lens.copy_(lens)
        self.indices.copy_(rows)
        for x in (self.q, self.new_k, self.new_v):
            x.copy_(torch.randn(x.shape, generator=generator))
        table, row = self.drafts.table(self.table, self.page_size)
        # What each branch reads, with NaN in every other slot; a branch that begins on a page has a copy of the tail.
        for x in (self.k, self.v):
            x.fill_(torch.nan)
            x[0] = 0.0
            values = torch.randn(REQUESTS, CONTEXT, KV_HEADS, DIM, generator=generator).to(x)
            values[:, :SHARED] = values[0, :SHARED]
            for i in range(self.rows - padded * self.branches):
                length = int(lens[i // self.branches])
                x[table[row[i], :length].long()] = values[i // self.branches, :length]
        own = (self.drafts.lens() - 1).clamp_(max=table.shape[1] - 1)
        self.loc.copy_(table[row[None], own].long())

    def run(self, steps: list) -> None:
        for step, plan in enumerate(steps):
            self.k.index_copy_(0, self.loc[step], self.new_k[step])
            self.v.index_copy_(0, self.loc[step], self.new_v[step])
            for layer in range(2):
                plan.attend(layer, self.q[step], self.k, self.v, self.out[step], scale=SCALE)

    def snapshot(self) -> list:
        return self.attention.snapshot_drafts(self.drafts, self.table)

    def check(self, padded: int = 0) -> None:
        """After a round: each step against the definition in float64, on the slots that its branch may see."""
        table, row = (x.cpu() for x in self.drafts.table(self.table, self.page_size))
        rows = self.rows - padded * self.branches
        assert self.out[:, :rows].isfinite().all()
        for step, lens in enumerate(self.drafts.lens().cpu()):
            want = reference.extend(
                self.q[step].cpu()[:rows],
                self.k.cpu(),
                self.v.cpu(),
                table,
                row[:rows],
                lens[:rows],
                torch.ones(rows, dtype=torch.int64),
                page_size=self.page_size,
                scale=SCALE,
            )
            error = (self.out[step, :rows].cpu().double() - want).norm() / want.norm()
            assert error < 5e-3, (step, error)


@pytest.mark.parametrize(("branches", "page_size"), SHAPES)
def test_every_step_equals_the_definition(branches, page_size):
    drafting = Drafting(branches, page_size)
    for seed in range(2):
        drafting.fill(seed)
        drafting.run(drafting.snapshot())
        drafting.check()


@pytest.mark.parametrize(("branches", "page_size"), SHAPES)
def test_one_graph_follows_tables_that_change(branches, page_size):
    """Padding comes and goes, and the live table is overwritten before each replay."""
    drafting = Drafting(branches, page_size)
    drafting.fill(0)
    steps = drafting.snapshot()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for _ in range(2):  # as SGLang warms up
        steps[0].plan()
        drafting.run(steps)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        steps[0].plan()
        drafting.run(steps)
    for seed, padded in ((1, 0), (2, 2), (3, 0)):
        drafting.fill(seed, padded)
        drafting.run(drafting.snapshot())
        drafting.check(padded)
        eager = drafting.out.clone()
        drafting.fill(seed, padded)
        drafting.out.fill_(torch.nan)
        drafting.snapshot()
        drafting.table.fill_(7)
        graph.replay()
        rows = drafting.rows - padded * branches
        assert torch.equal(drafting.out[:, :rows], eager[:, :rows]), "eager and replay differ"
