"""The decode kernels on an e4m3 cache against float64 on the values that it holds, on a GPU."""

from __future__ import annotations

import random

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.decode_cases import APART, GENERATED, RUNS, Decode, Forest, exact, forest, random_case, runs, strided
from gpu.fp8_cases import E4M3, assert_close_to, e4m3_pools

from flashcore_sglang.reference import scaled

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
MIXED = [(2, 1024), (8, 256), (64, 300)]


def attend(
    f: Forest, heads=32, kv_heads=8, head_dim=128, dtype=BF16, k_scale=None, v_scale=None, spread=1.0, **options
) -> None:
    k, v = e4m3_pools(f.owned, kv_heads, head_dim)
    q = torch.randn(f.batch, heads, head_dim, device="cuda", dtype=dtype) * spread
    options["scale"] = head_dim**-0.5
    out = Decode(f.layout(), heads, kv_heads, head_dim, kv_dtype=E4M3)(
        q, k, v, k_scale=k_scale, v_scale=v_scale, **options
    )
    torch.cuda.synchronize()
    assert_close_to(exact(f, q, scaled(k, k_scale), scaled(v, v_scale), **options), out)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 5000])
def test_one_request_of_any_length_is_exact(length):
    attend(forest([(1, length)]))


@pytest.mark.parametrize("order", ["runs", "interleaved", "permuted", "fragmented"])
@pytest.mark.parametrize("page_size", [1, 2, 16, 48, 64, 128])
def test_pages_of_any_size_and_order_are_read_right(page_size, order):
    attend(forest([(1, 4 * 768), (5, 800)], page_size, order, lens=[1, 128, 799, 800, 300]))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("epochs", APART)
def test_tokens_that_lie_apart_are_read_right(epochs, head_dim):
    attend(strided([epochs] * 3), head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_items_of_runs_are_read_right(head_dim):
    attend(runs(RUNS * 3), heads=32, kv_heads=8, head_dim=head_dim)
    attend(strided(GENERATED * 3), heads=32, kv_heads=8, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_head_dims_and_dtypes_are_exact(head_dim, dtype):
    attend(forest([(1, 640), (40, 300)], order="permuted"), head_dim=head_dim, dtype=dtype)
    attend(forest([(3, 700)]), head_dim=head_dim, dtype=dtype)
    for length in (63, 64, 65, 127, 128, 129):
        attend(forest([(3, length)]), head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (32, 8), (28, 4), (16, 1), (6, 2), (5, 1)])
def test_head_ratios_are_exact(heads, kv_heads):
    attend(forest([(1, 500), (33, 70)]), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(
    "levels", [[(64, 200)], [(1, 2048), (16, 100)], [(1, 512), (4, 256), (64, 40)], [(1, 4096), (256, 33)]]
)
def test_forests_are_exact(levels):
    attend(forest(levels, order="interleaved"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["number", "tensor", "per head", "only k"])
def test_scales_of_any_kind_are_applied(kind, head_dim):
    k, v = {
        "number": (0.37, 1.9),
        "tensor": (torch.tensor([0.37]), torch.tensor(1.9)),
        "per head": (torch.rand(8) + 0.2, torch.rand(8) * 3 + 0.2),
        "only k": (torch.tensor(0.37), None),
    }[kind]
    k, v = (x.cuda() if isinstance(x, torch.Tensor) else x for x in (k, v))
    for levels in ([(1, 1000), (40, 200)], [(3, 300)]):
        attend(forest(levels), head_dim=head_dim, k_scale=k, v_scale=v)
        attend(forest(levels), head_dim=head_dim, k_scale=k, v_scale=v, logit_cap=20.0, spread=4.0)
        attend(forest(levels), head_dim=head_dim, k_scale=k, v_scale=v, sinks=torch.randn(32, device="cuda"))


def test_a_request_of_length_zero_gives_zeros():
    attend(forest([(4, 100)], lens=[0, 50, 0, 100]))


def test_queries_beyond_fp16_are_taken_as_its_largest():
    f = forest([(3, 300)])
    k, v = e4m3_pools(f.owned, 8, 128)
    q = torch.randn(3, 32, 128, device="cuda", dtype=BF16)
    q[:, :, 5] = 1e6
    out = Decode(f.layout(), 32, 8, 128, kv_dtype=E4M3)(q, k, v, scale=1e-6)
    q[:, :, 5] = 65504.0
    assert_close_to(exact(f, q.double().clamp(max=65504.0), scaled(k, None), scaled(v, None), scale=1e-6), out)


def test_random_forests_are_exact():
    rng = random.Random(11)
    for _ in range(25):
        f, heads, kv_heads, *rest = random_case(rng, ["runs", "interleaved", "permuted", "fragmented"])
        k_scale = rng.choice([None, 0.5, torch.rand(kv_heads, device="cuda") + 0.1])
        v_scale = rng.choice([None, 2.5, torch.rand(1, device="cuda") + 0.1])
        attend(f, heads, kv_heads, *rest, k_scale, v_scale)


def _setup(f: Forest, head_dim: int = 128):
    k, v = e4m3_pools(f.owned, 8, head_dim)
    q = torch.randn(f.batch, 32, head_dim, device="cuda", dtype=BF16)
    return q, k, v, Decode(f.layout(), 32, 8, head_dim, kv_dtype=E4M3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_two_runs_agree_bitwise(head_dim):
    q, k, v, decode = _setup(forest(MIXED, order="interleaved"), head_dim)
    first = decode(q, k, v, scale=0.1)
    for _ in range(20):
        assert torch.equal(decode(q, k, v, scale=0.1), first)


def test_a_graph_reads_the_scales_of_its_replay():
    q, k, v, decode = _setup(forest(MIXED, order="interleaved"))
    scales = {"k_scale": torch.tensor(0.5, device="cuda"), "v_scale": torch.tensor(2.0, device="cuda")}
    out = torch.empty_like(q)
    decode.schedule()
    decode.run(q, k, v, out, scale=0.1, **scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.run(q, k, v, out, scale=0.1, **scales)
    for number in (0.5, 0.25):
        scales["k_scale"].fill_(number)
        out.fill_(float("nan"))
        graph.replay()
        want = torch.empty_like(q)
        decode.run(q, k, v, want, scale=0.1, **scales)
        assert torch.equal(out, want)


def test_the_values_are_those_of_the_same_cache_in_fp16():
    f = forest(MIXED, order="interleaved")
    q, k, v, decode = _setup(f)
    half = Decode(f.layout(), 32, 8, 128)(q.half(), k.half(), v.half(), scale=0.1)
    torch.testing.assert_close(decode(q.half(), k, v, scale=0.1), half, atol=2e-3, rtol=2e-3)


def test_bad_arguments_are_named():
    q, k, v, decode = _setup(forest([(2, 64)]))
    decode.schedule()
    out = torch.empty_like(q)
    for bad, name in [
        (
            lambda: decode.run(q, k, v.view(torch.uint8), out, scale=1.0),
            "v_cache: want the dtype of q or float8_e4m3fn",
        ),
        (lambda: decode.run(q, k, v.to(BF16), out, scale=1.0), "v_cache: want"),
        (lambda: decode.run(q, k, v, out, scale=1.0, k_scale=torch.zeros(3, device="cuda")), "k_scale: want"),
        (lambda: decode.run(q, k, v, out, scale=1.0, v_scale=-1.0), "v_scale: want a positive"),
        (
            lambda: decode.run(q, k.to(BF16), v.to(BF16), out, scale=1.0, v_scale=torch.ones(1, device="cuda")),
            "v_scale: want none",
        ),
    ]:
        with pytest.raises(ValueError, match=name):
            bad()
