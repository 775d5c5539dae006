"""What the pictures of a report show, read off the figures before they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from moextend_pl.reports import plots
from moextend_pl.reports.report_text import markdown

DATA: dict[str, Any] = {
    "vqa_accuracy": 0.9,
    "vqa_accuracy_aligned": 0.4,
    "text_accuracy_base": 0.99,
    "text_accuracy_extended": 0.99,
    "text_accuracy_open": 0.95,
    "text_logits_identical": True,
    "frozen_unchanged": False,
    "trainable_parameters": 1200,
    "total_parameters": 40_000,
    "delta_bytes": 250_000,
    "layers": [1, 3],
    "source_experts": [[0], [2, 1]],
    "seconds": {"data": 2.4, "total": 61.0},
    "peak_memory_gb": 1.3,
}
FULL = {
    "vqa_accuracy": 0.98,
    "text_accuracy": 0.8,
    "trainable_parameters": 30_000,
    "seconds": 5.0,
    "learning_rate": 1e-3,
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def test_bars_of_accuracy_are_pictures_and_text_of_every_model(drawn: list[Figure], tmp_path: Path) -> None:
    plots.plot_accuracies({**DATA, "full_finetune": FULL}, tmp_path / "accuracy.png")
    (axis,) = drawn[0].axes
    pictures, text = ([bar.get_width() for bar in bars] for bars in axis.containers)  # type: ignore[union-attr]
    assert pictures == [0.0, 0.4, 0.9, 0.9, 0.98]
    assert text == [0.99, 0.99, 0.99, 0.95, 0.8]
    shown = [words.get_text() for words in axis.texts]
    assert shown[0] == "-"  # the text model has not seen a picture
    assert shown[-1] == "0.800"
    assert [label.get_text() for label in axis.get_yticklabels()][-1] == "full fine-tuning"


def test_a_loss_is_drawn_once_a_step_and_validation_where_there_is_one(drawn: list[Figure], tmp_path: Path) -> None:
    rows = ["step,train/loss,val/loss", "0,3.0,", "1,2.0,", "1,,2.5", "1,2.1,"]  # step 1 was taken again
    metrics = {"a": tmp_path / "a.csv", "b": tmp_path / "b.csv"}
    metrics["a"].write_text("\n".join(rows))
    metrics["b"].write_text("\n".join(row.rpartition(",")[0] + "," for row in rows if not row.endswith(".5")))
    plots.plot_losses(metrics, tmp_path / "losses.png")
    first, second = drawn[0].axes
    assert [line.get_xydata().tolist() for line in first.lines] == [[[0, 3.0], [1, 2.1]], [[1, 2.5]]]  # type: ignore[union-attr]
    assert [line.get_label() for line in second.lines] == ["train"]


def test_a_figure_is_written_where_no_folder_is_yet(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "shift.png"
    plots.plot_scores({0: 0.1, 1: 0.3}, [1], "ShiftRule", path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def test_report_tells_what_does_not_hold_and_does_without_a_baseline() -> None:
    text = markdown(DATA)
    assert "bit-identical to the base's: **yes**" in text
    assert "bit-identical to the base's files: **NO**" in text
    assert "layer 1 from expert 0, layer 3 from expert 2, 1" in text
    assert "a delta of 0.25 MB" in text
    assert "| base language model | - | 0.9900 | - |" in text
    assert "baseline" not in text
    assert "learning rate 0.001" in markdown({**DATA, "full_finetune": FULL})
