"""Tables and arguments that are wrong: a clear error or a cut range, no fault, no other request's KV."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.decode_cases import Forest, assert_accurate, forest, pools

from flashcore_sglang.gpu_decode import GpuDecode

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM = 8, 2, 128
SCALE = DIM**-0.5


class Step:
    """A decode step of a small tree. Slots that no request owns hold NaN, but for the padding page."""

    def __init__(self, page_size: int = 1) -> None:
        self.f = forest([(2, 256), (6, 80)], page_size, "interleaved", [80, 33, 80, 1, 64, 80])
        self.k, self.v = pools(self.f, KV_HEADS, DIM, torch.bfloat16)
        self.k[:page_size], self.v[:page_size] = 0.25, -0.5
        self.q = torch.randn(self.f.batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.full_like(self.q, torch.nan)
        self.rows = torch.arange(1, self.f.batch + 1)
        self.decode = GpuDecode(
            page_size=page_size, num_pages=self.f.num_pages, max_rows=self.f.batch, max_tokens=self.f.table.shape[1],
            heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM,
        )  # fmt: skip

    def __call__(self, table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        self.decode.snapshot(table.cuda(), rows.cuda(), lens.cuda())
        self.decode.plan()
        self.decode.attend(self.q, self.k, self.v, self.out, scale=SCALE)
        torch.cuda.synchronize()
        return self.out

    def check(self, table: torch.Tensor, lens: torch.Tensor) -> None:
        """The output is that of a batch with this table and these lengths."""
        meant = Forest(self.f.page_size, self.f.num_pages, table, lens)
        assert_accurate(meant, self.out, self.q, self.k, self.v, scale=SCALE)


@pytest.mark.parametrize("value", [-1, -(2**31), 2**30, 2**31 - 1, None])
@pytest.mark.parametrize("page_size", [1, 16])
def test_ids_outside_the_pool_read_the_padding_page(page_size, value):
    step = Step(page_size)
    value = step.f.num_slots if value is None else value  # None: the first slot outside
    table, meant, block = step.f.table.clone(), step.f.table.clone(), 272 // page_size
    at = slice(block * page_size, (block + 1) * page_size)
    for row in (1, 3):
        table[row, at] = value
        meant[row, at] = torch.arange(page_size, dtype=torch.int32)
    step(table, step.rows, step.f.seq_lens)
    step.check(meant, step.f.seq_lens)
    assert step.decode.pager.violation() == (1, 0, 272, value)


def test_ids_outside_the_pool_in_a_shared_prefix_read_the_padding_page():
    step = Step()
    table, meant = step.f.table.clone(), step.f.table.clone()
    table[1:4, 100:140], meant[1:4, 100:140] = 2**30, 0
    step(table, step.rows, step.f.seq_lens)
    step.check(meant, step.f.seq_lens)


def test_lengths_outside_the_table_are_cut():
    step = Step()
    width = step.f.table.shape[1]
    full, lens = step.f.seq_lens.clone(), step.f.seq_lens.clone()
    lens[0], lens[1], lens[2] = width + 1, -3, 2**31 - 1
    full[0], full[1], full[2] = width, 0, width
    step(step.f.table, step.rows, lens)
    step.check(step.f.table, full)
    assert step.decode.pager.violation() == (2, 0, 0, width + 1)


def test_pool_indices_outside_the_table_give_zeros():
    step = Step()
    rows, lens = step.rows.clone(), step.f.seq_lens.clone()
    rows[1], rows[4] = -1, 2**40
    step(step.f.table, rows, lens)
    lens[1] = lens[4] = 0
    step.check(step.f.table, lens)
    assert step.decode.pager.violation() == (5, 1, 0, -1)


def test_a_step_after_a_bad_one_is_right():
    step = Step()
    bad = step.f.table.clone()
    bad[:, 50:60] = -7
    step(bad, step.rows, step.f.seq_lens + 1000)
    step(step.f.table, step.rows, step.f.seq_lens)
    step.check(step.f.table, step.f.seq_lens)


def test_arguments_that_do_not_fit_are_value_errors():
    step = Step()
    step(step.f.table, step.rows, step.f.seq_lens)
    q, k, v, out = step.q, step.k, step.v, step.out
    table, rows, lens = step.f.table.cuda(), step.rows.cuda(), step.f.seq_lens.cuda()
    wide = torch.cat([q, q], 2)[:, :, :DIM]  # heads 2 * DIM apart
    for message, arguments in (
        ("q: want bfloat16 or float16", (q.float(), k, v, out)),
        ("q: want", (wide, k, v, out)),
        ("q: want", (q[:, :, :100], k, v, out)),
        ("q: want a CUDA tensor", (q.cpu(), k, v, out)),
        ("k_cache: want", (q, k[:, :, :64], v, out)),
        ("k_cache.*: want the dtype of q", (q, k.half(), v, out)),
        ("k_cache: want a CUDA tensor", (q, k.cpu(), v.cpu(), out)),
        ("v_cache: want", (q, k, v[:-1], out)),
        ("out: want", (q, k, v, out[:-1])),
        ("out: want a CUDA tensor", (q, k, v, out.cpu())),
        ("heads: want a multiple of kv_heads", (q[:, :7].contiguous(), k, v, out[:, :7].contiguous())),
    ):
        with pytest.raises(ValueError, match=message):
            step.decode.attend(*arguments, scale=SCALE)
    for options, message in (
        ({"scale": 0.0}, "scale: want"),
        ({"scale": SCALE, "logit_cap": -1.0}, "logit_cap: want"),
        ({"scale": SCALE, "sinks": torch.zeros(HEADS, dtype=torch.bfloat16, device="cuda")}, "sinks: want"),
        ({"scale": SCALE, "sinks": torch.zeros(HEADS)}, "sinks: want a CUDA tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            step.decode.attend(q, k, v, out, **options)
    for message, snapshot in (
        ("seq_lens: want 1 .. 6 rows", (table, rows.repeat(2), lens.repeat(2))),
        ("req_to_token: want", (table.t(), rows, lens)),
        ("req_to_token: want", (table.long(), rows, lens)),
        ("seq_lens: want a CUDA tensor", (table, rows, lens.cpu())),
        ("req_pool_indices: want contiguous", (table, rows.repeat(2)[::2], lens)),
    ):
        with pytest.raises(ValueError, match=message):
            step.decode.snapshot(*snapshot)
    step(step.f.table, step.rows, step.f.seq_lens)
    step.check(step.f.table, step.f.seq_lens)
