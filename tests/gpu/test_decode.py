"""The decode kernels against float64, on a GPU."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.decode_cases import (
    APART,
    GENERATED,
    RUNS,
    Decode,
    Forest,
    assert_accurate,
    forest,
    pools,
    random_case,
    runs,
    strided,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16


def attend(f: Forest, heads=32, kv_heads=8, head_dim=128, dtype=BF16, sinks=False, logit_cap=0.0, spread=1.0):
    k, v = pools(f, kv_heads, head_dim, dtype)
    q = torch.randn(f.batch, heads, head_dim, device="cuda", dtype=dtype) * spread
    options = {"scale": head_dim**-0.5, "logit_cap": logit_cap}
    options["sinks"] = torch.randn(heads, device="cuda") if sinks else None
    out = Decode(f.layout(), heads, kv_heads, head_dim)(q, k, v, **options)
    torch.cuda.synchronize()
    assert_accurate(f, out, q, k, v, **options)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 5000])
def test_one_request_of_any_length_is_exact(length):
    attend(forest([(1, length)]))


@pytest.mark.parametrize("order", ["runs", "interleaved", "permuted"])
@pytest.mark.parametrize("page_size", [1, 2, 16, 48, 64, 128])
def test_pages_of_any_size_and_order_are_read_right(page_size, order):
    attend(forest([(1, 4 * 768), (5, 800)], page_size, order, lens=[1, 128, 799, 800, 300]))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("epochs", APART)
def test_tokens_that_lie_apart_are_read_right(epochs, head_dim):
    attend(strided([epochs] * 3), head_dim=head_dim)
    attend(strided(APART), heads=6, kv_heads=3, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("ratio", [3, 12])
def test_items_of_runs_are_read_right(head_dim, ratio):
    # Three times: the first items of the CTAs are not read as runs.
    attend(runs(RUNS * 3), heads=8 * ratio, kv_heads=8, head_dim=head_dim)
    attend(runs([[40, 50]] * 700), heads=2 * ratio, kv_heads=2, head_dim=head_dim)  # several for every CTA


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_items_of_a_run_and_of_tokens_apart_are_read_right(head_dim):
    attend(strided(GENERATED * 3), heads=32, kv_heads=8, head_dim=head_dim)
    attend(forest([(1, 512), (400, 90)], order="interleaved"), heads=8, kv_heads=2, head_dim=head_dim)


@pytest.mark.parametrize(
    "request_, first, step",
    [
        ([(1, 90)], 90, 1),
        ([(1, 40), (5, 50)], 41, 5),  # the first of those apart continues the run
        ([(5, 90)], 0, 5),
        ([(1, 1)], 0, 1),
        ([(1, 3), (5, 20), (4, 20)], -1, 0),
        ([(-1, 90)], -1, 0),
        ([(1, 600)], None, 1),
    ],
)
def test_items_of_one_or_two_runs_are_marked(request_, first, step):
    requests, tokens = 500, sum(n for _, n in request_)
    decode = Decode(strided([request_] * requests).layout(), 8, 2, 128)
    decode.schedule()
    items = decode.work_items()
    assert items.shape[0] >= requests and items[:, 5].sum() == requests * tokens
    marked = (items[:, 7] >> 20) - 1
    if first is None:  # too long, unless it has been cut
        assert torch.equal(marked, torch.where(items[:, 5] <= 512, items[:, 5], -1))
    else:
        assert (marked == first).all() and (items[:, 6] >> 16 == step).all()


def test_slots_that_are_no_whole_number_of_heads_are_read_right():
    f = strided([[(3, 300)], [(1, 200)]])
    k, v = (torch.empty(f.num_slots * (8 * 128 + 8), device="cuda", dtype=BF16) for _ in range(2))
    k, v = (x.as_strided((f.num_slots, 8, 128), (8 * 128 + 8, 128, 1)) for x in (k, v))
    for x, values in zip((k, v), pools(f, 8, 128, BF16), strict=True):
        x.copy_(values)
    q = torch.randn(f.batch, 32, 128, device="cuda", dtype=BF16)
    assert_accurate(f, Decode(f.layout(), 32, 8, 128)(q, k, v, scale=0.1), q, k, v, scale=0.1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_head_dims_and_dtypes_are_exact(head_dim, dtype):
    attend(forest([(1, 640), (40, 300)], order="permuted"), head_dim=head_dim, dtype=dtype)
    attend(forest([(3, 700)]), head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(
    "heads, kv_heads", [(8, 8), (32, 8), (28, 4), (12, 2), (16, 1), (6, 2), (40, 8), (5, 1), (64, 1)]
)
def test_head_ratios_are_exact(heads, kv_heads):
    attend(forest([(1, 500), (33, 70)]), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(
    "levels",
    [
        [(64, 200)],
        [(1, 2048), (16, 100)],
        [(1, 1024), (64, 64)],
        [(1, 512), (4, 256), (64, 40)],
        [(4, 512), (32, 256), (256, 64), (1024, 32)],
        [(1, 4096), (256, 33)],
    ],
)
def test_forests_are_exact(levels):
    attend(forest(levels, order="interleaved"))


@pytest.mark.parametrize("rows, longest", [(9, 70000), (40, 30000), (140, 30000)])
def test_one_long_request_among_short_ones_is_exact(rows, longest):
    attend(forest([(rows, longest)], lens=[longest] + [100] * (rows - 1)))


def test_a_request_of_length_zero_gives_zeros():
    f = forest([(4, 100)], lens=[0, 50, 0, 100])
    attend(f)
    attend(f, sinks=True)


@pytest.mark.parametrize("logit_cap, sinks", [(30.0, False), (0.0, True), (50.0, True)])
def test_logit_cap_and_sinks_are_exact(logit_cap, sinks):
    for levels in ([(1, 1000), (40, 200)], [(3, 300)]):
        attend(forest(levels), logit_cap=logit_cap, sinks=sinks, spread=4.0)


def test_random_forests_are_exact():
    rng = random.Random(7)
    for _ in range(25):
        attend(*random_case(rng, ["runs", "interleaved", "permuted"]))


def _setup(f: Forest):
    k, v = pools(f, 8, 128, BF16)
    return torch.randn(f.batch, 32, 128, device="cuda", dtype=BF16), k, v, Decode(f.layout(), 32, 8, 128)


MIXED = [(2, 1024), (8, 256), (64, 300)]


def test_two_runs_agree_bitwise():
    q, k, v, decode = _setup(forest(MIXED, order="interleaved"))
    first = decode(q, k, v, scale=0.1)
    for _ in range(20):
        assert torch.equal(decode(q, k, v, scale=0.1), first)


def test_a_graph_replay_equals_eager_bitwise():
    q, k, v, decode = _setup(forest(MIXED, order="interleaved"))
    want = decode(q, k, v, scale=0.1)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.schedule()
        for _ in range(3):
            decode.run(q, k, v, out, scale=0.1)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)


def test_tokens_that_lie_apart_are_those_of_each_layer():
    f = strided(APART)
    layers = [pools(f, 8, 128, BF16, seed) for seed in (1, 2)]
    decode, q = Decode(f.layout(), 32, 8, 128), torch.randn(f.batch, 32, 128, device="cuda", dtype=BF16)
    want = [decode(q, k, v, scale=0.1) for k, v in layers]
    for out, (k, v) in zip(want, layers, strict=True):
        assert_accurate(f, out, q, k, v, scale=0.1)
    outs = [torch.full_like(q, float("nan")) for _ in layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.schedule()
        for (k, v), out in zip(layers, outs, strict=True):
            decode.run(q, k, v, out, scale=0.1)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(outs, want, strict=True))


def test_permuting_requests_permutes_outputs():
    f = forest(MIXED)
    q, k, v, decode = _setup(f)
    order = torch.randperm(f.batch)
    g = f.reordered(order)
    a, b = decode(q, k, v, scale=0.1), Decode(g.layout(), 32, 8, 128)(q[order.cuda()], k, v, scale=0.1)
    torch.testing.assert_close(b, a[order.cuda()], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("exponent", [-math.inf, -60, 100])
def test_partial_results_hold_values_of_any_size(exponent):
    f = forest(MIXED)
    q, k, v, decode = _setup(f)
    want = decode(q, k, v, scale=0.1)
    assert torch.equal(decode(q, k, v * 2.0**exponent, scale=0.1), want * 2.0**exponent)


def test_few_partial_slots_split_less_and_stay_exact():
    f = forest([(2, 20000)])
    k, v = pools(f, 8, 128, BF16)
    q = torch.randn(2, 32, 128, device="cuda", dtype=BF16)
    out = Decode(f.layout(), 32, 8, 128, partial_capacity=5)(q, k, v, scale=0.1)
    assert_accurate(f, out, q, k, v, scale=0.1)


def test_bad_arguments_are_named():
    q, k, v, decode = _setup(forest([(2, 64)]))
    decode.schedule()
    out = torch.empty_like(q)
    for bad, name in [
        (lambda: decode.run(q.float(), k, v, out, scale=1.0), "q: want bfloat16 or float16"),
        (lambda: decode.run(q, k[:, :, :64], v, out, scale=1.0), "k_cache: want"),
        (lambda: decode.run(q, k, v[:-1], out, scale=1.0), "v_cache: want"),
        (lambda: decode.run(q, k, v, out.cpu(), scale=1.0), "out: want a CUDA tensor"),
        (lambda: decode.run(q, k, v, out, scale=-1.0), "scale: want"),
        (lambda: decode.run(q, k, v, out, scale=1.0, sinks=torch.zeros(3, device="cuda")), "sinks: want"),
    ]:
        with pytest.raises(ValueError, match=name):
            bad()


@pytest.mark.parametrize("first, step", [(-20, 1), (-20, 7), (1 << 30, 1), (-3000, 32767), (-3000, 32768), (-1, 0)])
def test_runs_that_leave_the_pool_fault_nothing(first, step):
    f = runs([[90]] * 500)
    q, k, v, decode = _setup(f)
    pages = torch.arange(90, dtype=torch.int64) * step + first + (f.num_slots if first < 0 else 0)
    decode.page_indices[: 250 * 90] = pages.clamp(max=2**31 - 1).to(torch.int32).repeat(250).cuda()
    good = decode(q, k, v, scale=0.1)
    torch.cuda.synchronize()
    assert torch.isfinite(good[decode.row_order.long()[250:]]).all()


def test_tables_out_of_range_fault_nothing():
    f = forest([(1, 300), (8, 300)])
    q, k, v, decode = _setup(f)
    for array, value in itertools.product(
        ("page_indices", "row_order", "segment_rows", "segment_positions"), (-5, 1 << 30)
    ):
        good = getattr(decode, array).clone()
        getattr(decode, array)[::3] = value
        decode(q, k, v, scale=0.1)
        torch.cuda.synchronize()
        getattr(decode, array).copy_(good)
