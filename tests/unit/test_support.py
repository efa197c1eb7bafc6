"""The README's table of what is served."""

from __future__ import annotations

import json

import pytest
import support


def test_readme_has_the_table_of_the_recorded_tests():
    readme = support.README.read_text()
    assert support.replaced(readme, json.loads(support.RESULTS.read_text())) == readme, "run scripts/support.py"


def test_every_test_that_a_row_names_exists():
    named = {test for _, *both in support.ROWS for tests in both for test in tests}
    for test in named:
        file, function = test.split("::")
        assert f"def {function}(" in (support.ROOT / "tests" / file).read_text(), test


def test_cell_says_what_ran():
    ran = {"tests/a": {"passed": 3, "failed": 0}, "tests/b": {"passed": 2, "failed": 1}}
    assert support.cell([], ran) == "—"
    assert support.cell(["a"], ran) == "yes (3 tests)"
    assert support.cell(["a", "b"], ran) == "**fails**"
    assert support.cell(["a", "c"], ran) == "not run"


def test_record_of_one_device_leaves_the_other_alone():
    test = f"tests/{support.ROWS[0][1][0]}"
    record = {"device": "cpu", "sglang": "0.5.16", "passed": {test: 9, "tests/other": 1}, "failed": {}}
    results = support.merged({"hopper": {"x": {}}}, record)
    assert results == {"hopper": {"x": {}}, "cpu": {test: {"passed": 9, "failed": 0, "sglang": "0.5.16"}}}


def test_records_of_one_device_are_added_up():
    parts = [
        {"device": "cpu", "sglang": "", "passed": {"a": 1}, "failed": {}},
        {"device": "cpu", "sglang": "", "passed": {"a": 2, "b": 1}, "failed": {"a": 1}},
    ]
    [total] = support.summed(parts)
    assert (total["passed"], total["failed"]) == ({"a": 3, "b": 1}, {"a": 1})


def test_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="want one <!-- support: begin -->"):
        support.replaced("no marks", {})
