"""The extend kernels against float64, on a GPU."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from gpu.extend_cases import GATHER_ALWAYS, Extend, assert_accurate, batch, exact, pools, tree_mask

from flashcore_sglang.config import GatherModel
from flashcore_sglang.gpu_extend import Visible

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def attend(
    b, heads=32, kv_heads=8, head_dim=128, dtype=BF16, *, sinks=False, logit_cap=0.0, spread=1.0, mask=None, **plan
):
    k, v = pools(b, kv_heads, head_dim, dtype)
    q = torch.randn(b.num_tokens, heads, head_dim, device="cuda", dtype=dtype) * spread
    options = {"scale": head_dim**-0.5, "logit_cap": logit_cap}
    options["sinks"] = torch.randn(heads, device="cuda") if sinks else None
    e = Extend(b, heads, kv_heads, head_dim, **plan)
    e.plan()
    got = e(q, k, v, custom_mask=None if mask is None else mask.cuda(), **options)
    torch.cuda.synchronize()
    assert_accurate(got, exact(e, q, k, v, custom_mask=mask, **options))
    return e


def test_one_small_prompt_is_exact():
    attend(batch([(0, [(0, 40)])]))


@pytest.mark.parametrize("new", [*EDGES, 1000, 3000])
def test_one_prompt_of_any_length_is_exact(new):
    attend(batch([(0, [(0, new)])]))


@pytest.mark.parametrize("cached, new", itertools.product([1, 127, 128, 129, 1000], [1, 33, 129, 500]))
def test_new_tokens_on_a_cached_prefix_are_exact(cached, new):
    attend(batch([(0, [(cached, new)])]))


def test_requests_of_many_lengths_are_exact():
    attend(batch([(0, [(cached, new) for cached in (0, 5, 128, 300) for new in [0, *EDGES]])]))


@pytest.mark.parametrize("order", ["runs", "interleaved", "permuted"])
@pytest.mark.parametrize("page_size", [1, 2, 16, 32, 64, 128])
def test_pages_of_any_size_and_order_are_read_right(page_size, order):
    attend(batch([(768, [(0, 8), (30, 100), (5, 1)]), (0, [(700, 300), (0, 129)])], page_size, order))


@pytest.mark.parametrize("order", ["runs", "interleaved", "permuted"])
@pytest.mark.parametrize("page_size", [1, 2, 16, 32])
def test_scattered_tokens_that_are_gathered_first_are_read_right(page_size, order):
    b = batch([(768, [(0, 8), (30, 100), (5, 1)]), (0, [(700, 300), (0, 513), (290, 9)])], page_size, order)
    e = attend(b, gather=GATHER_ALWAYS)
    assert (e.gathered_slots > 0) == (order != "runs")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_is_gathered_is_exact_for_every_head_dim_and_ratio(head_dim):
    b = batch([(640, [(0, 40)] * 9), (0, [(0, 700), (300, 200), (20000, 3)])], order="permuted")
    for heads, kv_heads in ((32, 8), (7, 1), (10, 5)):
        assert attend(b, heads, kv_heads, head_dim, FP16, gather=GATHER_ALWAYS).gathered_slots > 20000


def test_only_what_there_is_room_for_is_gathered():
    b = batch([(640, [(0, 40)] * 9), (0, [(0, 900), (300, 200)])], order="permuted")
    e = attend(b, gather=GatherModel(mebibytes=4, max_page_size=1, rows_scattered=1, rows_boxed=1, rows_converted=1))
    assert 0 < e.gathered_slots <= 1024


def test_rows_that_gather_a_prefix_without_sharing_tiles_are_exact():
    b = batch([(512, [(0, 300), (40, 200)])], order="permuted")
    assert attend(b, gather=GATHER_ALWAYS).gathered_slots > 0
    assert attend(b, gather=GATHER_ALWAYS, visible=Visible.ALL).gathered_slots > 0
    assert attend(b, gather=GATHER_ALWAYS, window_left=100).gathered_slots == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_head_dims_and_dtypes_are_exact(head_dim, dtype):
    for order in ("runs", "permuted"):
        b = batch([(640, [(0, 9), (70, 30)]), (0, [(0, 700), (300, 200)])], order=order)
        attend(b, head_dim=head_dim, dtype=dtype)
        attend(b, head_dim=head_dim, dtype=dtype, sinks=True, logit_cap=20.0)


@pytest.mark.parametrize(
    "heads, kv_heads", [(8, 8), (28, 4), (12, 2), (16, 1), (6, 2), (40, 8), (5, 1), (7, 1), (20, 2), (33, 3)]
)
def test_head_ratios_are_exact(heads, kv_heads):
    attend(batch([(300, [(0, 9)] * 7), (0, [(100, 200), (0, 77)])]), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(
    "groups",
    [
        [(2048, [(0, 8)] * 40)],
        [(2048, [(0, 64)] * 9)],
        [(1024, [(i % 5, 1 + i % 7) for i in range(50)])],
        [(512, [(0, 1)] * 70), (1024, [(3, 5)] * 20), (0, [(0, 400)])],
        [(4096, [(0, 33)] * 10)],
    ],
)
def test_shared_prefixes_are_exact(groups):
    attend(batch(groups))
    attend(batch(groups, order="interleaved"), heads=8, kv_heads=1)


def test_a_prefix_shared_on_two_levels_is_exact():
    b = batch([(1024, [(0, 8)] * 24)])
    for r in range(24):  # within it, groups of 8 share another 600 tokens, of the first row of each
        first = b.table[r // 8 * 8 + 1]
        b.table[r + 1, 1000:] = 0
        b.table[r + 1, :1000] = first[:1000]
    b.table = torch.cat([b.table, torch.zeros(25, 700, dtype=torch.int32)], 1)
    at = b.num_pages
    for g in range(3):
        shared = torch.arange(at, at + 600, dtype=torch.int32)
        at += 600
        for r in range(8 * g, 8 * g + 8):
            b.table[r + 1, 1000:1600] = shared
            b.table[r + 1, 1600:1608] = torch.arange(at, at + 8, dtype=torch.int32)
            at += 8
    b.seq_lens, b.num_pages = torch.full((24,), 1608), at
    attend(b)


@pytest.mark.parametrize("cached, new", [(20000, 1), (20000, 16), (50000, 130), (9000, 300)])
def test_few_queries_on_a_long_prefix_are_cut_into_chunks_and_exact(cached, new):
    attend(batch([(0, [(cached, new)])]), sinks=True)
    attend(batch([(0, [(cached, new)])]), heads=2, kv_heads=1, head_dim=64)
    attend(batch([(0, [(cached, new)])]), head_dim=256, dtype=FP16)


def test_a_cached_prefix_and_decodes_in_one_batch_are_exact():
    attend(batch([(0, [(3000, 500), *((900 + i, 1) for i in range(40))]), (0, [(0, 700)])], order="interleaved"))


def test_requests_without_tokens_write_nothing_and_disturb_nothing():
    attend(batch([(0, [(0, 0), (0, 40), (0, 0), (50, 0), (10, 10), (0, 0)])]))


@pytest.mark.parametrize("window", [0, 1, 63, 128, 1000])
def test_sliding_windows_are_exact(window):
    attend(batch([(512, [(0, 40)] * 3), (0, [(1000, 700), (0, 300)])]), window_left=window)


def test_attention_that_is_not_causal_is_exact():
    attend(batch([(0, [(0, 77), (0, 500), (300, 200)]), (640, [(0, 9)] * 9)]), visible=Visible.ALL)


def test_trees_of_drafts_are_exact():
    for groups in ([(0, [(500, 7), (128, 33), (3, 64)])], [(1024, [(0, 8)] * 20), (0, [(3000, 16)])]):
        b = batch(groups, order="interleaved")
        attend(b, visible=Visible.MASKED, mask=tree_mask(b))


@pytest.mark.parametrize("logit_cap, sinks", [(30.0, False), (0.0, True), (50.0, True)])
def test_logit_cap_and_sinks_are_exact(logit_cap, sinks):
    attend(batch([(512, [(0, 8)] * 9), (0, [(100, 300)])]), logit_cap=logit_cap, sinks=sinks, spread=4.0)


def test_random_batches_are_exact():
    rng = random.Random(11)
    for _ in range(30):
        page_size, kv_heads = rng.choice([1, 1, 16, 64]), rng.choice([1, 2, 8])
        groups = []
        for _ in range(rng.randint(1, 3)):
            shared = page_size * rng.randint(0, 2500 // page_size)
            most = rng.choice([4, 40, 400])
            requests = [(rng.randint(0, 300), rng.randint(0, most)) for _ in range(rng.choice([1, 3, 20]))]
            groups.append((shared, requests))
        groups.append((0, [(0, 1)]))
        attend(
            batch(groups, page_size, rng.choice(["runs", "interleaved", "permuted"]), seed=rng.randint(0, 99)),
            kv_heads * rng.choice([1, 2, 4, 7]),
            kv_heads,
            rng.choice([64, 128, 128, 256]),
            rng.choice([BF16, FP16]),
            sinks=rng.random() < 0.3,
            logit_cap=rng.choice([0.0, 0.0, 25.0]),
        )


MIXED = [(1024, [(0, 8)] * 20), (0, [(9000, 5), (100, 700), (0, 33)])]


def _setup(b, **options):
    k, v = pools(b, 8, 128, BF16)
    q = torch.randn(b.num_tokens, 32, 128, device="cuda", dtype=BF16)
    return q, k, v, Extend(b, 32, 8, 128, **options)


def test_two_runs_agree_bitwise():
    q, k, v, e = _setup(batch(MIXED, order="interleaved"))
    e.plan()
    first = e(q, k, v, scale=0.1)
    for i in range(10):
        if i % 3 == 0:
            e.plan()
        assert torch.equal(e(q, k, v, scale=0.1), first)


def test_a_graph_replay_equals_eager_bitwise():
    q, k, v, e = _setup(batch(MIXED))
    e.plan()
    want, out = e(q, k, v, scale=0.1), torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        e.plan()
        for _ in range(2):
            e.kernels.attend(q, k, v, out, scale=0.1)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


def test_without_sharing_results_agree():
    b = batch(MIXED)
    q, k, v, e = _setup(b)
    e.plan()
    lone = Extend(b, 32, 8, 128, sharing=False)
    lone.plan()
    torch.testing.assert_close(lone(q, k, v, scale=0.1), e(q, k, v, scale=0.1), atol=2e-2, rtol=2e-2)


def test_a_larger_step_than_any_before_is_served():
    b = batch([(0, [(0, 300)])])
    q, k, v, e = _setup(b, max_tokens=16)
    before = e.kernels.mebibytes
    e.plan()
    assert e.kernels.mebibytes > before
    assert_accurate(e(q, k, v, scale=0.1), exact(e, q, k, v, scale=0.1))


def test_tables_and_lengths_out_of_range_fault_nothing():
    b = batch(MIXED)
    q, k, v, e = _setup(b)
    x = e.kernels._layout
    for name, value in itertools.product(
        ("row_order", "segment_rows", "segment_positions", "segment_entries", "row_segments", "table"), (-5, 1 << 29)
    ):
        e.pager.build()
        good = getattr(x, name).clone()
        getattr(x, name).flatten()[::3] = value
        _schedule_only(e, e.seq_lens, e.q_lens)
        e(q, k, v, scale=0.1)
        torch.cuda.synchronize()
        getattr(x, name).copy_(good)
    for seq_lens, q_lens in ((e.seq_lens * 0 - 7, e.q_lens), (e.seq_lens, e.q_lens * 3), (e.seq_lens * 100, e.q_lens)):
        _schedule_only(e, seq_lens, q_lens)
        e(q, k, v, scale=0.1)
        torch.cuda.synchronize()


def _schedule_only(e, seq_lens, q_lens):
    """``plan`` without the pager's build, which would mend the tables."""
    build, e.pager.build = e.pager.build, lambda: None
    try:
        e.kernels.plan(seq_lens, q_lens, e.b.num_tokens)
    finally:
        e.pager.build = build


def test_bad_arguments_are_named():
    q, k, v, e = _setup(batch([(0, [(0, 64)])]))
    e.plan()
    out = torch.empty_like(q)
    for bad, name in [
        (lambda: e.kernels.attend(q[:3], k, v, out[:3], scale=1.0), "q: want 64 tokens"),
        (lambda: e.kernels.attend(q.float(), k, v, out, scale=1.0), "q: want bfloat16 or float16"),
        (lambda: e.kernels.attend(q, k[:, :, :64], v, out, scale=1.0), "k_cache: want"),
        (lambda: e.kernels.attend(q, k, v[:-1], out, scale=1.0), "v_cache: want"),
        (lambda: e.kernels.attend(q, k, v, out.cpu(), scale=1.0), "out: want a CUDA tensor"),
        (lambda: e.kernels.attend(q, k, v, out, scale=-1.0), "scale: want"),
        (lambda: e.kernels.attend(q, k, v, out, scale=1.0, logit_cap=-1.0), "logit_cap: want"),
        (lambda: e.kernels.attend(q, k, v, out, scale=1.0, sinks=torch.zeros(3, device="cuda")), "sinks: want"),
        (lambda: e.kernels.attend(q, k, v, out, scale=1.0, custom_mask=q), "custom_mask: want"),
        (lambda: e.kernels.plan(e.seq_lens[:0], e.q_lens, 64), "seq_lens: want"),
        (lambda: e.kernels.plan(e.seq_lens, e.q_lens.float(), 64), "q_lens: want"),
        (lambda: e.kernels.plan(e.seq_lens, e.q_lens, 64, visible=Visible.ALL, window_left=3), "window_left: want"),
    ]:
        with pytest.raises(ValueError, match=name):
            bad()
