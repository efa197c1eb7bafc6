"""What the benchmarks want, and the chart they draw, without a GPU."""

import argparse
import json
import sys

import bench_decode
import pytest
import torch
from gpu.decode_cases import forest, nodes_of

CASES = {case.name: case for case in bench_decode.CASES}


@pytest.mark.parametrize(
    "name, order, wanted",
    [
        ("shared 64: 8192 + 512", "runs", 4.5),
        ("shared 64: 8192 + 512", "interleaved", 4.05),
        ("shared 64: 8192 + 512", "permuted", 3.6),
        ("dense 1 x 8192", "runs", 1.6),
        ("dense 1 x 8192", "interleaved", 0.99),
        ("dense 1 x 8192", "permuted", 0.95),
        ("tree 8,256", "runs", 3.8),
        ("fragmented 64: 8192 + 512", "runs", 0.0),
    ],
)
def test_case_wants_the_ratio_of_its_order(name, order, wanted):
    assert CASES[name].wanted_in(order) == pytest.approx(wanted)


def test_cases_of_other_page_sizes_are_left_out():
    def names(page_size):
        args = argparse.Namespace(cases="", quick=False, page_size=page_size)
        return [case.name for case in bench_decode.chosen(args)]

    assert names(1) == list(CASES)
    assert names(64) == [name for name in CASES if not name.startswith("near")]


def test_quick_cases_exist():
    assert set(bench_decode.QUICK) <= set(CASES)


@pytest.mark.parametrize("order", ["runs", "interleaved", "fragmented", "permuted"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_forest_gives_every_node_pages_of_its_own(order, page_size):
    f = forest((((3, 1), 32), (4, 40)), page_size, order)
    own = [set(f.slots(r).tolist()) for r in range(4)]
    shared = set(f.table[1, :32].tolist())
    assert own[0] & own[1] == own[1] & own[2] == shared
    assert not own[0] & own[3]
    assert set().union(*own) <= set(range(page_size, f.num_slots))  # page 0 is padding


def test_nodes_of_uneven_levels_are_those_given():
    assert torch.equal(nodes_of((2, 1, 3), 6), torch.tensor([0, 0, 1, 2, 2, 2]))
    assert torch.equal(nodes_of(3, 6), torch.tensor([0, 0, 1, 1, 2, 2]))


def test_chart_draws_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import chart

    case = {"case": "a", "ratio": 2.0, "flashinfer_ratio": None, "wanted_ratio": 1.5, "percent_of_floor": 50.0}
    record = {"gpu": "GPU", "heads": 32, "kv_heads": 8, "head_dim": 128, "order": "runs", "page_size": 1}
    result = tmp_path / "decode_runs_p1.json"
    result.write_text(json.dumps(record | {"cases": [case | {"ours_us": 10.0, "plan_us": 40.0}]}))
    monkeypatch.setattr(sys, "argv", ["chart.py", str(result), "--out", str(tmp_path / "chart.png")])
    chart.main()
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
