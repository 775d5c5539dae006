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
GUARD = [{"class_path": "moextend_pl.LogitTerm", "init_args": {"scope": "text"}}]
TERMS = [
    {"class_path": "moextend_pl.LogitTerm", "init_args": {"weight": 5.0, "mean": "samples"}},
    {"class_path": "moextend_pl.HiddenTerm", "init_args": {"scope": "text"}},
    {"class_path": "moextend_pl.RelationTerm"},
    {"class_path": "moextend_pl.AffinityTerm"},
]


def distilled_stage(world: TinyWorld, run: Path, teacher: dict[str, str], terms: list[dict]) -> Path:
    path = write_stage(world, run, "align")
    config = yaml.safe_load(path.read_text())
    config["model"]["class_path"] = "moextend_pl.Distill"
    config["model"]["init_args"] |= {"teacher": teacher, "terms": terms}
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.TrainOnly":
            callback["init_args"]["parts"] = ["projector", *(["distillation"] if terms == TERMS else [])]
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_terms_of_two_processes_are_those_of_one(tiny_world: TinyWorld, tmp_path: Path, strategy: str) -> None:
    teacher = teaching_run(tiny_world, tmp_path / "teacher")
    trained_alike(tiny_world, tmp_path, strategy, {"run": str(teacher)}, TERMS, NAMES)
    for run in ("one", "two"):  # a model as any other, which knows of no teacher
        assert not any("adapters" in name for name in load(tmp_path / run).state_dict())


def test_a_shared_base_teaches_also_where_one_process_has_pictures_only(tiny_world: TinyWorld, tmp_path: Path) -> None:
    trained_alike(tiny_world, tmp_path, "fsdp2", {}, GUARD, ("train/loss", "train/logits_forward_text"))


def trained_alike(
    world: TinyWorld, folder: Path, strategy: str, teacher: dict[str, str], terms: list[dict], names: tuple[str, ...]
) -> None:
    one, two = (distilled_stage(world, folder / run, teacher, terms) for run in ("one", "two"))
    cli.run(["fit", "--config", str(one)])
    finish(two, "--trainer.devices", "2", "--trainer.strategy", strategy)
    expected, got = (metrics(folder / run, names) for run in ("one", "two"))
    assert list(got) == list(expected) == list(range(8))
    for step, values in expected.items():
        assert len(values) == len(names)
        assert got[step] == pytest.approx(values, rel=1e-4, abs=1e-6), f"step {step}"
