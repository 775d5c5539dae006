"""The judge of coverage: counts lines apart from branches, room by room."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def covered(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import covered

    return covered


def summary(lines: int, of: int, branches: int = 0, both: int = 0) -> dict[str, Any]:
    counts = {"covered_lines": lines, "num_statements": of, "covered_branches": branches, "num_branches": both}
    return {"summary": counts}


def test_lines_below_the_bar_fail_and_untaken_branches_do_not(
    covered: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    enough = covered.rooms({"a/one.py": summary(100, 100, 0, 50), "b/two.py": summary(90, 100)})
    assert covered.judge(enough) == 0
    assert covered.judge(covered.rooms({"a/one.py": summary(189, 200, 50, 50)})) == 1
    assert "fewer than 95% of the lines" in capsys.readouterr().err


def test_files_are_added_up_by_room(covered: ModuleType) -> None:
    counts = covered.rooms({"a/one.py": summary(3, 4), "a/two.py": summary(1, 2), "a/b/three.py": summary(5, 5)})
    assert {room: row["covered_lines"] for room, row in counts.items()} == {"a": 4, "a/b": 5, "all": 9}


def test_copies_outside_of_the_repository_are_not_counted(covered: ModuleType, tmp_path: Path) -> None:
    copy = str(tmp_path / "moextend_pl" / "one.py")
    counts = covered.rooms({"a/one.py": summary(3, 4), copy: summary(0, 900)})
    assert counts["all"]["num_statements"] == 4


def test_a_recorded_run_is_read(covered: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COVERAGE_FILE", str(tmp_path / "data"))
    recorded = covered.Coverage(config_file=str(covered.ROOT / "setup.cfg"), data_suffix=False)
    data = recorded.get_data()
    data.add_arcs({str(covered.ROOT / "moextend_pl" / "__main__.py"): [(-1, 1), (1, -1)]})
    recorded.save()
    assert covered.main() == 1
