"""The quickstart's own decisions; its numbers are judged on a whole run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.quickstart import command as quickstart
from moextend_pl.quickstart.runner import RECEIPT, SECONDS, Runner, stage_is_finished
from moextend_pl.reports.report_text import markdown
from moextend_pl.runs.atomic import read_json, write_json
from moextend_pl.runs.fingerprints import file_sha256

DATA: dict[str, Any] = {
    "vqa_accuracy": 0.98, "vqa_accuracy_aligned": 0.5, "text_accuracy_base": 0.975, "text_accuracy_extended": 0.975,
    "text_accuracy_open": 0.9, "text_logits_identical": True, "frozen_unchanged": True, "trainable_parameters": 33184,
    "trainable_parameters_aligned": 8320, "total_parameters": 405336, "delta_bytes": 1e6, "layers": [1],
    "source_experts": [[0]], "seconds": {"total": 1.0}, "peak_memory_gb": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"outputs": 3}', b"{}"])
def test_stage_with_a_damaged_receipt_is_not_finished(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "delta").write_text("x")
    write_json(tmp_path / RECEIPT, {"outputs": {"delta": file_sha256(tmp_path / "delta")}})
    assert stage_is_finished(tmp_path)
    (tmp_path / RECEIPT).write_bytes(damage)
    assert not stage_is_finished(tmp_path)


def test_damaged_record_of_seconds_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / SECONDS).write_text('{"data": 3')
    run = Runner(replace(quickstart.RECIPE, steps=()), tmp_path)
    run.run()
    run._add_seconds("data", 2.0)
    assert read_json(tmp_path / SECONDS) == {"data": 2.0}


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--trainer.max_steps", "5"], ["--trainer.max_steps", "5"]),
        (
            ["--trainer.max_steps=5", "--trainer.precision", "32"],
            ["--trainer.max_steps=5", "--trainer.precision", "32"],
        ),
        (["5"], None),
        (["--trainer.max_steps=5", "5"], None),
        (["--trainer.max_steps", "--otu"], None),
        (["--trainer.max_steps", "5", "6"], None),
    ],
)
def test_options_of_the_trainer_are_taken_in_both_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], given: list[str] | None
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(Runner, "run", lambda self, _: seen.append(self.overrides))
    if given is None:
        with pytest.raises(UserError, match="quickstart does not accept"):
            quickstart.main(["--out", str(tmp_path), *words])
    else:
        assert quickstart.main(["--out", str(tmp_path), *words]) == 0
        assert seen == [given]


def test_report_tells_whose_parameters_it_counts() -> None:
    text = markdown(DATA)
    assert "Tower, projector and language model have\n405,336 parameters, of which 33,184 learned" in text
    assert "| aligned (projector only) | 0.5000 | 0.9750 | 8,320 |" in text
    earlier = {key: value for key, value in DATA.items() if key != "trainable_parameters_aligned"}
    assert "| aligned (projector only) | 0.5000 | 0.9750 | - |" in markdown(earlier)
