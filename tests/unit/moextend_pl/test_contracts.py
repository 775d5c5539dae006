"""The plan file: what it may hold, and what it says when it holds something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.tiny_world import make_plan

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UserError

PLAN = make_plan(sources=(1, 1), init="preserving", routing="open", calibration="none", seed=3)


def test_plan_survives_its_file(tmp_path: Path) -> None:
    plan = replace(PLAN, report={"rule": "ShiftRule", "scores": {0: 0.5}})
    plan.save(tmp_path / "plan.yaml")
    assert ExtensionPlan.load(tmp_path / "plan.yaml") == plan


def test_options_can_be_changed_and_are_checked() -> None:
    assert replace(PLAN, routing="masked").routing == "masked"
    assert PLAN.routing == "open"
    with pytest.raises(
        UserError, match=r"`routing` of the extension plan in \['open', 'masked', .*'masked_sound'\], got 'closed'"
    ):
        replace(PLAN, routing="closed")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((LayerGrowth(2, (0,)), LayerGrowth(1, (0,))), r"rising order, got \[2, 1\]"),
        ((LayerGrowth(1, (0,)), LayerGrowth(1, (1,))), r"once and in rising order, got \[1, 1\]"),
        ((LayerGrowth(-1, (0,)),), "layer >= 0"),
        ((LayerGrowth(0, ()),), "at least one source expert"),
        ((LayerGrowth(0, (1, -1)),), "source expert >= 0"),
    ],
)
def test_impossible_layers_are_refused(layers: tuple[LayerGrowth, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExtensionPlan(layers=layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "expected `schema: 1`, got 2"),
        ({"layers": [{"layer": 0}]}, "not a valid extension plan"),
        ({"experts": 3}, "not a valid extension plan"),
        ({"layers": [{"layer": 0, "sources": [7], "sauces": 1}]}, "not a valid extension plan"),
        ({"layers": [{"layer": "first", "sources": [7]}]}, r"whole numbers, got \['first'\]"),
        ({"layers": [{"layer": 0, "sources": "12"}]}, r"whole numbers, got \['1', '2'\]"),
        ({"layers": [{"layer": 1.7, "sources": [1]}]}, r"whole numbers, got \[1.7\]"),
        ({"seed": "abc"}, r"whole numbers, got \['abc'\]"),
        ({"task": 2024}, "text as `task` of the extension plan, got 2024"),
        ({"init": "zero"}, "got 'zero'"),
    ],
)
def test_damaged_plan_file_is_one_clear_mistake(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN.to_dict(), **change}))
    with pytest.raises(UserError, match=message):
        ExtensionPlan.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"- 1\n", b"layers: [", b"schema: 1\n", b"schema: 1\n\xff"],
    ids=["empty", "list", "cut", "no layers", "no text"],
)
def test_file_that_is_no_plan_is_one_clear_mistake(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="plan.yaml"):
        ExtensionPlan.load(path)


def test_missing_plan_names_the_stage_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file. Run the probe stage first"):
        ExtensionPlan.load(tmp_path / "plan.yaml")


def test_plan_with_aliases_is_refused_and_none_is_written(tmp_path: Path) -> None:
    shared = [0.5, 0.25]
    replace(PLAN, report={"before": shared, "after": shared}).save(tmp_path / "plan.yaml")
    assert ExtensionPlan.load(tmp_path / "plan.yaml").report["after"] == shared
    text = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(12))
    (tmp_path / "plan.yaml").write_text(f"schema: 1\nlayers: []\nreport:\n  {text.replace(chr(10), chr(10) + '  ')}\n")
    with pytest.raises(UserError, match="without aliases"):
        ExtensionPlan.load(tmp_path / "plan.yaml")
    (tmp_path / "plan.yaml").write_text("[" * 5000)
    with pytest.raises(UserError, match="not valid YAML"):
        ExtensionPlan.load(tmp_path / "plan.yaml")
