"""A stage with a teacher, as a stage file names it, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.distilled import teaching_run
from helpers.stages import finish, metrics, write_stage
from helpers.tiny_world import TinyWorld

from moextend_pl import cli, load

pytestmark = pytest.mark.slow
NAMES = ("train/loss", "train/logits_forward_answer", "train/hidden_text", "train/relation", "train/affinity")
TERMS = [
    {"class_path": "moextend_pl.LogitTerm", "init_args": {"weight": 5.0, "mean": "samples"}},
    {"class_path": "moextend_pl.HiddenTerm", "init_args": {"scope": "text"}},
    {"class_path": "moextend_pl.RelationTerm"},
    {"class_path": "moextend_pl.AffinityTerm"},
]


def distilled_stage(world: TinyWorld, run: Path, teacher: Path) -> Path:
    path = write_stage(world, run, "align")
    config = yaml.safe_load(path.read_text())
    config["model"]["class_path"] = "moextend_pl.Distill"
    config["model"]["init_args"] |= {"teacher": {"run": str(teacher)}, "terms": TERMS}
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.TrainOnly":
            callback["init_args"]["parts"] = ["projector", "distillation"]
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_terms_of_two_processes_are_those_of_one(tiny_world: TinyWorld, tmp_path: Path, strategy: str) -> None:
    teacher = teaching_run(tiny_world, tmp_path / "teacher")
    one, two = (distilled_stage(tiny_world, tmp_path / run, teacher) for run in ("one", "two"))
    cli.run(["fit", "--config", str(one)])
    finish(two, "--trainer.devices", "2", "--trainer.strategy", strategy)
    expected, got = (metrics(tmp_path / run, NAMES) for run in ("one", "two"))
    assert list(got) == list(expected) == list(range(8))
    for step, values in expected.items():
        assert len(values) == len(NAMES)
        assert got[step] == pytest.approx(values, rel=1e-4, abs=1e-6), f"step {step}"
    for run in ("one", "two"):  # a model as any other, which knows of no teacher
        assert not any("adapters" in name for name in load(tmp_path / run).state_dict())
