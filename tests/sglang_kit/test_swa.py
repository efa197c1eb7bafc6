"""SGLang's sliding-window cases on our backend, and longer ones."""

from __future__ import annotations

import pytest
from sglang_kit.kit import HOPPER, build, case, check, kit, prepare, share_prefixes

pytestmark = [pytest.mark.contract, *([pytest.mark.gpu] if HOPPER else [])]

LAYOUTS = ("contiguous", "shuffled_pages", "interleaved_pages")
CASES = kit.make_swa_no_prefix_input_config_cases("flashcore_sparse") + kit.make_swa_prefix_input_config_cases(
    "flashcore_sparse"
)


@pytest.fixture(autouse=True)
def _prepared(monkeypatch):
    prepare(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swa", CASES, ids=[c.name for c in CASES])
def test_kit_case_equals_its_reference(swa, layout):
    check(build(swa, loc_layout=layout))


@pytest.mark.parametrize("window", [1, 127, 300])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_decode_with_a_window(page_size, window):
    check(build(case("decode", [700, 640, 1, 300, 33, 513, 0], page_size=page_size, window=window)))


@pytest.mark.parametrize("window", [1, 127, 300])
@pytest.mark.parametrize("page_size", [1, 16])
def test_extend_with_a_window(page_size, window):
    extended = case("extend", [512, 40, 256, 0], extend_lens=[3, 200, 17, 150], page_size=page_size, window=window)
    check(build(extended))


def test_shared_prefix_with_a_window():
    fixture = build(case("shared", [700, 640, 655, 300], window=200))
    share_prefixes(fixture, [([0, 1, 2], 640)])
    check(fixture)
