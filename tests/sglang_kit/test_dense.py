"""SGLang's dense attention cases on our backend, and the same with shared prefixes."""

from __future__ import annotations

import dataclasses

import pytest
from sglang_kit.kit import HOPPER, build, case, check, kit, prepare, share_prefixes

pytestmark = [pytest.mark.contract, *([pytest.mark.gpu] if HOPPER else [])]

LAYOUTS = ("contiguous", "shuffled_pages", "interleaved_pages", "non_monotonic_extend")
DENSE = kit.make_dense_cases("flashcore_sparse")


@pytest.fixture(autouse=True)
def _prepared(monkeypatch):
    prepare(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dense", DENSE, ids=[c.name for c in DENSE])
def test_kit_case_equals_its_reference(dense, layout):
    if layout == "non_monotonic_extend" and dense.page_size > 1:
        pytest.skip("the layout tears pages apart, which SGLang's allocators never do")
    check(build(dense, loc_layout=layout))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
def test_decode_over_shared_pages_equals_separate_requests(page_size, heads, kv_heads):
    shared = case("shared", [700, 640, 655, 300, 33, 513, 0], heads=heads, kv_heads=kv_heads, page_size=page_size)
    fixture = build(shared)
    share_prefixes(fixture, [([0, 1, 2], 640), ([3, 5], 256)])
    check(fixture)


def test_decode_over_a_tree_of_prefixes():
    fixture = build(case("tree", [900, 901, 902, 903, 904, 905]))
    share_prefixes(fixture, [([0, 1, 2, 3, 4, 5], 400), ([1, 2, 3], 640), ([4, 5], 832), ([2, 3], 896)])
    check(fixture)


def test_every_request_is_the_same():
    fixture = build(case("same", [512] * 5))
    share_prefixes(fixture, [([0, 1, 2, 3, 4], 512)])
    check(fixture)


@pytest.mark.parametrize("page_size", [1, 16])
def test_extend_over_shared_pages(page_size):
    extended = case("extend", [512, 512, 256, 0], extend_lens=[3, 40, 17, 5], page_size=page_size)
    fixture = build(extended)
    share_prefixes(fixture, [([0, 1], 512), ([0, 2], 256)])
    check(fixture)


def test_groups_that_change_from_step_to_step():
    """One backend; the same rows pass to other groups, whose pages were another group's a step before."""
    lens = [600, 600, 600, 600]
    groups = ([([0, 1, 2, 3], 512)], [([0, 1], 512), ([2, 3], 384)], [([0, 3], 256)], [], [([1, 2, 3], 600)])
    first = build(case("changing", lens))
    for i, of_step in enumerate(groups):
        fixture = build(dataclasses.replace(first.case, name=f"changing {i}"))
        first.runner.req_to_token_pool.req_to_token.copy_(fixture.runner.req_to_token_pool.req_to_token)
        for name in ("get_key_buffer", "get_value_buffer"):
            pool, other = first.runner.token_to_kv_pool, fixture.runner.token_to_kv_pool
            getattr(pool, name)(0).copy_(getattr(other, name)(0))
        step = dataclasses.replace(fixture, runner=first.runner, backend=first.backend)
        share_prefixes(step, of_step)
        check(step)
