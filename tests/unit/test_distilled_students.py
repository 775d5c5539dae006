"""The benchmark of distilled students: its arms differ in the teacher alone, and its numbers are counted by hand."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
T_2 = 4.302652729749  # 97.5 % quantile of Student's t with 2 degrees of freedom, as printed tables have it


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("distillation")


def found_of(students: Any, gains: dict[str, list[float]]) -> Any:
    """Measures by arm and seed: 1 for the arm alone, and so much more (KL: times so much) for the others."""
    return {
        arm: {seed: dict.fromkeys(students.MEASURES, 1 + gain) for seed, gain in enumerate(values)}
        for arm, values in gains.items()
    }


def test_intervals_are_those_of_students_t(students: Any) -> None:
    mean, low, high = students.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - T_2 / math.sqrt(3), 2 + T_2 / math.sqrt(3)))
    assert students.interval([1.0]) == (1.0, -math.inf, math.inf)


def test_differences_are_paired_by_seed(students: Any) -> None:
    found = found_of(students, {"none": [0.0, 10.0, 20.0], "llavadi": [1.0, 12.0, 23.0]})
    half = T_2 / math.sqrt(3)  # of 1, 2, 3, however far the seeds lie apart
    first, *_ = students.table(found).splitlines()[2:]
    assert first.split(" | ")[1:] == ["11.0000", "13.0000", f"+2.0000 ({2 - half:+.4f} to {2 + half:+.4f}) |"]


def test_shares_are_geometric_means(students: Any) -> None:
    found = found_of(students, {"none": [0.0, 0.0, 0.0], "llava_kd": [-0.5, -0.75, -0.875]})  # a half, 1/4, 1/8
    half = T_2 * math.log(2) / math.sqrt(3)
    last = students.table(found).splitlines()[-1].split(" | ")
    assert last[2] == "0.25"
    assert last[3] == f"({0.25 * math.exp(-half):.2f} to {0.25 * math.exp(half):.2f}) |"


@pytest.mark.parametrize("name", ["1_dpt", "2_sft", "3_dft"])
def test_arms_differ_in_the_teacher_alone(students: Any, name: str, tmp_path: Path) -> None:
    places = [
        students.student_places(name, tmp_path / "before", arm, 3, tmp_path, tmp_path / "base") for arm in students.ARMS
    ]
    taught = {"base", "model.init_args.teacher.run", "model.init_args.terms"}
    apart = taught | {"trainer.callbacks+.TrainOnly.init_args.parts"}
    alone, *others = ({place: value for place, value in each.items() if place not in apart} for each in places)
    assert all(other == alone for other in others)
    assert alone["data.init_args.rows.seed"] == alone["seed_everything"] == 3
    assert any(taught & set(each) for each in places) == (name != "2_sft")
