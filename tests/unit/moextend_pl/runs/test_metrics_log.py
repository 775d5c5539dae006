"""`metrics.csv` of a run that is continued."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from moextend_pl.contracts import UserError
from moextend_pl.runs.metrics_log import GoesOn, MLflowRun, RunLogger, TensorBoardRun, WandbRun, last_steps


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


class Told(GoesOn, RunLogger):
    def show(self, name: str, picture: Image.Image, step: int) -> None:
        self.shown = step


def test_what_an_earlier_start_has_told_is_not_told_again(tmp_path: Path) -> None:
    first = RunLogger(str(tmp_path / "run"))
    for step in range(3):
        first.log_metrics({"train/loss": 2.0 - step}, step=step)
    first.log_metrics({"val/loss": 3.0}, step=1)
    again = RunLogger(str(tmp_path / "run"))  # went on from an earlier checkpoint, and was killed before it was as far
    again.log_metrics({"train/loss": 1.0}, step=1)
    other = Told(str(tmp_path / "other"))
    other.known = last_steps(tmp_path / "run")
    assert (other.known["train/loss"], other.known["val/loss"]) == (2, 1)
    other.log_metrics({"train/loss": 1.0, "val/loss": 5.0}, step=2)
    other.log_metrics({"train/loss": 0.5}, step=3)
    assert [(row["step"], row["val/loss"], row["train/loss"]) for row in rows(tmp_path / "other")] == [
        ("2", "5.0", ""),
        ("3", "", "0.5"),
    ]
    other.log_picture("usage", Image.new("RGB", (2, 2)), 2)
    assert not hasattr(other, "shown")
    other.log_picture("usage", Image.new("RGB", (2, 2)), 3)
    assert other.shown == 3
    assert last_steps(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("logger", "library"), [(TensorBoardRun, "tensorboard"), (WandbRun, "wandb"), (MLflowRun, "mlflow")]
)
def test_service_that_is_not_installed_is_told_with_what_to_install(
    logger: type[GoesOn], library: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(UserError, match=rf'moextend_pl\[loggers\]"`, or leave {logger.__name__} out'):
        logger(str(tmp_path))
