"""The judge of a quickstart: passes good reports, names what is missing or broken."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GOOD: dict[str, Any] = {
    "vqa_accuracy": 0.98,
    "vqa_accuracy_aligned": 0.5,
    "text_accuracy_base": 0.975,
    "text_accuracy_extended": 0.975,
    "text_logits_identical": True,
    "frozen_unchanged": True,
    "trainable_parameters": 10,
    "total_parameters": 100,
    "layers": [1],
    "source_experts": [[0]],
    "seconds": {"total": 1.0},
    "full_finetune": {"vqa_accuracy": 0.9, "text_accuracy": 0.8, "seconds": 1.0},
}


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "check_report.py"
    spec = importlib.util.spec_from_file_location("check_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(judge: ModuleType, tmp_path: Path, report: dict[str, Any]) -> int:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    return judge.main([str(path)])


def test_good_report_passes(judge: ModuleType, tmp_path: Path) -> None:
    assert verdict(judge, tmp_path, GOOD) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vqa_accuracy", 0.969),
        ("text_accuracy_base", 0.969),
        ("text_accuracy_extended", 0.976),
        ("text_logits_identical", False),
        ("text_logits_identical", 1),
        ("frozen_unchanged", False),
    ],
)
def test_broken_promise_fails_and_is_named(
    judge: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    assert verdict(judge, tmp_path, {**GOOD, key: value}) == 1
    assert "FAILED: " in capsys.readouterr().err


@pytest.mark.parametrize("key", sorted(GOOD))
def test_missing_key_fails_and_is_named(
    judge: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert verdict(judge, tmp_path, {name: value for name, value in GOOD.items() if name != key}) == 1
    assert key in capsys.readouterr().err


def test_missing_baseline_key_is_named(judge: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = {"vqa_accuracy": 0.9, "seconds": 1.0}
    assert verdict(judge, tmp_path, {**GOOD, "full_finetune": baseline}) == 1
    assert "full_finetune.text_accuracy" in capsys.readouterr().err
