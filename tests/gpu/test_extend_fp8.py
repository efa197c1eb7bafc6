"""The extend kernels on an e4m3 cache against float64 on the values that it holds, on a GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.extend_cases import GATHER_ALWAYS, Batch, Extend, batch, exact, tree_mask
from gpu.fp8_cases import E4M3, assert_close_to, e4m3_pools

from flashcore_sglang.config import GatherModel
from flashcore_sglang.gpu_extend import Visible
from flashcore_sglang.reference import scaled

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
MIXED = [(1024, [(0, 8)] * 20), (0, [(9000, 5), (100, 700), (0, 33)])]


def attend(
    b: Batch, heads=32, kv_heads=8, head_dim=128, dtype=BF16, k_scale=None, v_scale=None, mask=None, sinks=False,
    logit_cap=0.0, spread=1.0, **options,
) -> Extend:  # fmt: skip
    k, v = e4m3_pools(b.owned, kv_heads, head_dim)
    q = torch.randn(b.num_tokens, heads, head_dim, device="cuda", dtype=dtype) * spread
    e = Extend(b, heads, kv_heads, head_dim, kv_dtype=E4M3, **options)
    e.plan()
    keywords = {"scale": head_dim**-0.5, "logit_cap": logit_cap}
    keywords["sinks"] = torch.randn(heads, device="cuda") if sinks else None
    keywords["custom_mask"] = None if mask is None else mask.cuda()
    out = e(q, k, v, k_scale=k_scale, v_scale=v_scale, **keywords)
    torch.cuda.synchronize()
    keywords["custom_mask"] = mask
    want = exact(e, q, scaled(k, k_scale), scaled(v, v_scale), **keywords)
    assert_close_to(want, out, dtype if e.gathered_slots else FP16)
    return e


@pytest.mark.parametrize("length", [1, 2, 31, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_one_prompt_of_any_length_is_exact(length, head_dim):
    attend(batch([(0, [(0, length)])]), head_dim=head_dim)


@pytest.mark.parametrize("order", ["runs", "interleaved", "permuted"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_pages_of_any_size_and_order_are_read_right(page_size, order):
    attend(batch([(256, [(0, 7), (128, 130), (5, 1)]), (0, [(300, 200), (0, 3)])], page_size, order))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_head_dims_and_dtypes_are_exact(head_dim, dtype):
    attend(batch(MIXED, order="permuted"), head_dim=head_dim, dtype=dtype)
    attend(batch(MIXED), head_dim=head_dim, dtype=dtype, sinks=True, logit_cap=20.0, spread=4.0)


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (28, 4), (16, 1), (6, 2), (5, 1)])
def test_head_ratios_are_exact(heads, kv_heads):
    attend(batch(MIXED), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("kind", ["number", "tensor", "per head"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scales_of_any_kind_are_applied(kind, head_dim):
    k, v = {
        "number": (0.37, 1.9),
        "tensor": (torch.tensor([0.37]).cuda(), torch.tensor(1.9).cuda()),
        "per head": (torch.rand(8).cuda() + 0.2, torch.rand(8).cuda() * 3 + 0.2),
    }[kind]
    b = batch([(512, [(0, 20)] * 9), (0, [(20000, 3), (7, 400)])])  # some tiles are cut into chunks
    attend(b, head_dim=head_dim, k_scale=k, v_scale=v)
    attend(b, head_dim=head_dim, k_scale=k, v_scale=v, sinks=True, logit_cap=15.0, spread=3.0)


def test_windows_and_masks_are_exact():
    attend(batch(MIXED), window_left=100)
    b = batch([(512, [(0, 8)] * 10), (0, [(70, 16)])])
    attend(b, visible=Visible.MASKED, mask=tree_mask(b))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_cache_that_is_converted_first_is_read_exactly(head_dim, dtype):
    convert = partial(attend, head_dim=head_dim, dtype=dtype, gather=GATHER_ALWAYS)
    b = batch([(2000, [(0, 40)] * 5), (0, [(700, 300), (0, 1), (127, 2)])], order="permuted")
    assert convert(b).gathered_slots >= 3000
    scales = {"k_scale": torch.rand(8).cuda() + 0.2, "v_scale": torch.tensor(1.9).cuda()}
    convert(b, **scales)
    convert(b, **scales, sinks=True, logit_cap=20.0, spread=3.0)
    convert(b, k_scale=0.37, v_scale=1.9)
    convert(batch([(512, [(0, 8)] * 10), (0, [(70, 16)])], 64), visible=Visible.ALL)


def test_trees_on_a_converted_cache_are_exact():
    b = batch([(512, [(0, 8)] * 10), (0, [(70, 16)])])
    assert attend(b, visible=Visible.MASKED, mask=tree_mask(b), gather=GATHER_ALWAYS).gathered_slots


def test_what_does_not_fit_or_pay_is_not_converted():
    b = batch([(0, [(3000, 700), (0, 300)])])
    small = GatherModel(mebibytes=8, max_page_size=32, rows_scattered=1, rows_boxed=1, rows_converted=1)
    assert attend(b, gather=small).gathered_slots == 0
    assert attend(b, gather=replace(GATHER_ALWAYS, rows_converted=2000)).gathered_slots
    assert attend(b, gather=replace(GATHER_ALWAYS, rows_converted=3000)).gathered_slots == 0
    assert attend(b, gather=GATHER_ALWAYS, window_left=100).gathered_slots == 0
    many = batch([(64, [(9, 40)] * 2)] * 400)  # segments
    assert attend(many, heads=8, kv_heads=2, gather=GATHER_ALWAYS).gathered_slots == 0


def test_random_batches_are_exact():
    rng = random.Random(5)
    for _ in range(20):
        page_size = rng.choice([1, 1, 16, 64])
        groups = [
            (
                page_size * rng.randint(0, 1500 // page_size),
                [(rng.choice([0, rng.randint(0, 600)]), rng.randint(1, rng.choice([4, 40, 400]))) for _ in range(n)],
            )
            for n in rng.choices([1, 2, 6], k=rng.randint(1, 4))
        ]
        kv_heads = rng.choice([1, 2, 8])
        attend(
            batch(groups, page_size, rng.choice(["runs", "interleaved", "permuted"])),
            kv_heads * rng.choice([1, 2, 4, 7]),
            kv_heads,
            rng.choice([64, 128, 128, 256]),
            rng.choice([BF16, FP16]),
            rng.choice([None, 0.5, torch.rand(kv_heads, device="cuda") + 0.1]),
            rng.choice([None, 2.5, torch.rand(1, device="cuda") + 0.1]),
            gather=rng.choice([None, GATHER_ALWAYS]),
        )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("gather", [None, GATHER_ALWAYS])
def test_two_runs_agree_bitwise(head_dim, gather):
    b = batch(MIXED, order="interleaved")
    k, v = e4m3_pools(b.owned, 8, head_dim)
    q = torch.randn(b.num_tokens, 32, head_dim, device="cuda", dtype=BF16)
    e = Extend(b, 32, 8, head_dim, kv_dtype=E4M3, gather=gather)
    e.plan()
    first = e(q, k, v, scale=0.1)
    for _ in range(10):
        assert torch.equal(e(q, k, v, scale=0.1), first)
