"""`metrics.csv` of a run that is continued."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.runs.metrics_log import RunLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_lie_in_the_run_directory_itself(tmp_path: Path) -> None:
    logger = RunLogger(str(tmp_path / "run"))
    logger.log_metrics({"train/loss": 2.0}, step=0)
    logger.save()
    assert [(row["step"], float(row["train/loss"])) for row in rows(tmp_path / "run")] == [("0", 2.0)]


def test_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    # A killed run does not take the steps before its checkpoint again, so their rows cannot be lost.
    RunLogger(str(tmp_path)).log_metrics({"train/loss": 2.0}, step=3)
    assert [row["step"] for row in rows(tmp_path)] == ["3"]


def test_table_that_is_none_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"\xff\x00\n1,2")
    with pytest.raises(UserError, match=r"metrics\.csv: not a table"):
        RunLogger(str(tmp_path)).log_metrics({"train/loss": 2.0}, step=0)
    assert path.read_bytes() == b"\xff\x00\n1,2"


def test_continued_run_keeps_rows_and_may_add_columns(tmp_path: Path) -> None:
    first = RunLogger(str(tmp_path))
    first.log_metrics({"train/loss": 2.0}, step=0)
    first.save()
    second = RunLogger(str(tmp_path))
    second.log_metrics({"train/loss": 1.0}, step=1)
    second.log_metrics({"val/loss": 3.0}, step=1)
    second.save()
    got = rows(tmp_path)
    assert [row["step"] for row in got] == ["0", "1", "1"]
    assert [row["train/loss"] for row in got] == ["2.0", "1.0", ""]
    assert [row["val/loss"] for row in got] == ["", "", "3.0"]
