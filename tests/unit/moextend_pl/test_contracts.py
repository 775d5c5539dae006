"""The plan file: what it may hold, and what it says when it holds something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny_world import make_plan

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UserError

PLAN = make_plan(sources=(1, 1), init="preserving", routing="open", calibration="none", seed=3)


def test_plan_survives_its_file(tmp_path: Path) -> None:
    plan = PLAN.with_options(report={"rule": "ShiftRule", "scores": {0: 0.5}})
    plan.save(tmp_path / "plan.yaml")
    assert ExtensionPlan.load(tmp_path / "plan.yaml") == plan


def test_options_can_be_changed_and_are_checked() -> None:
    assert PLAN.with_options(routing="masked").routing == "masked"
    assert PLAN.routing == "open"
    with pytest.raises(
        UserError, match=r"`routing` of the extension plan in \['open', 'masked', 'masked_tokens'\], got 'closed'"
    ):
        PLAN.with_options(routing="closed")


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
        ({"layers": [{"layer": 0, "sources": [7], "sauces": 1}], "experts": 3}, "not a valid extension plan"),
        ({"init": "zero"}, "got 'zero'"),
        ({"layers": [{"layer": "first", "sources": [1]}]}, r"plan\.yaml: not a valid extension plan .*'first'"),
    ],
    ids=["schema", "missing key", "unknown key", "wrong value", "wrong number"],
)
def test_damaged_plan_file_is_one_clear_mistake(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN.to_dict(), **change}))
    with pytest.raises(UserError, match=message):
        ExtensionPlan.load(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"- 1\n", b"layers: [", b"schema: 1\n", b"\x89PNG"],
    ids=["empty", "list", "cut", "no layers", "no text"],
)
def test_file_that_is_no_plan_is_one_clear_mistake(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match="plan.yaml"):
        ExtensionPlan.load(path)


def test_missing_plan_names_the_stage_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file. Run the probe stage first"):
        ExtensionPlan.load(tmp_path / "plan.yaml")
