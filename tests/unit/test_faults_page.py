"""The page of faults: every test that it names is there, and `make faults` counts them by row."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import faults

    return faults


def test_every_test_that_the_page_names_is_there(faults: ModuleType) -> None:
    page = faults.PAGE.read_text()
    named = {test for tests in faults.rows(page).values() for test in tests}
    assert len(named) > 40
    assert {test for line in page.splitlines() for test in faults.TEST.findall(line)} == named
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {test for where, test in named if where == file} <= there


def test_cases_are_counted_by_row(faults: ModuleType, tmp_path: Path) -> None:
    cases = "".join(
        f'<testcase classname="tests.unit.test_a" name="{name}">{inside}</testcase>'
        for name, inside in [("test_one[x]", ""), ("test_one[y]", "<failure/>"), ("test_two", "<skipped/>")]
    )
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counts = faults.outcomes(tmp_path / "report.xml")
    file = "tests/unit/test_a.py"
    assert counts == {(file, "test_one"): Counter(passed=1, failed=1), (file, "test_two"): Counter(skipped=1)}
    page = f"| 9 | a | b | `{file}::test_one` `{file}::test_two` | 3 passed |\n| 10 | a | b | `{file}::test_no` | |\n"
    one, two = faults.told(page, counts).splitlines()
    assert one.endswith("| 1 failed, 1 skipped, 1 passed |")
    assert two.endswith("`tests/unit/test_a.py::test_no` | |")
    assert faults.told(faults.told(page, counts), counts) == faults.told(page, counts)
