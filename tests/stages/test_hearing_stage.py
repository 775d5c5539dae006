"""A stage that teaches a seeing model to hear: from shards and a config to a run, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers.ranks import run_rounds
from helpers.sounds import TOKENS, both_entry, hearing_batch, sound_entry, tiny_whisper
from helpers.stages import metrics, write_stage
from helpers.tiny_world import TinyWorld, image_entry, make_plan, perturb, text_entry
from safetensors.torch import load_file

from datamodules.shards import write_shards
from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend
from moextend_pl.plan.stage_model import read_stage

pytestmark = pytest.mark.slow
NEW = ("new_experts", "new_routers", "calibration")
STEPS = 24
# One sample of each four has a sound alone, one both, so that one of two ranks often hears nothing.
MAKE = (sound_entry, text_entry, both_entry, image_entry)


def save_seeing(world: TinyWorld, run: Path) -> Path:
    model = world.model(make_plan(sources=(1, 2)), (*NEW, "projector"))
    perturb([p for name in (*NEW, "projector") for p in model.parts()[name]], size=0.1)
    save_delta(model, run)
    return run


def write_hearing(world: TinyWorld, folder: Path, run: str, **rows: object) -> str:
    """Writes the config of the stage; the shards, the audio model and the seeing run lie in the folder."""
    options = {"init_from": folder / "seeing", "plan": folder / "plan.yaml", "val": str(folder / "shards")}
    config = write_stage(world, folder / run, "extend", steps=STEPS, every=8, **options)
    content = yaml.safe_load(config.read_text())
    content["model"]["init_args"]["hearing"] = {"path": str(folder / "whisper"), "tokens": TOKENS, "depth": 1}
    content["model"]["init_args"]["optim"] = {"lr": 0.01, "schedule": "constant"}
    for callback in content["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.TrainOnly":
            callback["init_args"]["parts"] = [*NEW, "hearing"]
        if callback["class_path"] == "callbacks.ExpertExtension":
            callback["init_args"] = {"plan": str(folder / "plan.yaml")}
    content["data"]["init_args"].update(train=str(folder / "shards"), rows={"turns": "single", **rows})
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(config)


@pytest.fixture(scope="module")
def runs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the run of one process, that of two, one in two parts, and a packed one."""
    root = tmp_path_factory.mktemp("hearing")
    make_plan((0, 1), (2, 0), routing="masked_sound").save(root / "plan.yaml")
    save_seeing(tiny_world, root / "seeing")
    tiny_whisper(root / "whisper")
    (root / "shards").mkdir()
    write_shards([MAKE[number % 4](number) for number in range(24)], root / "shards", 8)
    cli.run(["fit", "--config", write_hearing(tiny_world, root, "one")])
    cli.run(["fit", "--config", write_hearing(tiny_world, root, "packed", packing=True, max_length=64)])
    parts = write_hearing(tiny_world, root, "parts")
    for steps in (8, STEPS):
        cli.run(["fit", "--config", parts, "--trainer.max_steps", str(steps)])
    two = ["fit", "--config", write_hearing(tiny_world, root, "two"), "--trainer.devices", "2"]
    run_rounds([(2, [[*two, "--trainer.strategy", "ddp"]])], root)
    return root


def test_the_loss_falls_and_what_was_seen_is_seen_bit_for_bit(runs: Path) -> None:
    losses = [values[0] for values in metrics(runs / "one").values()]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    before, after = MoExtend.load(runs / "seeing"), MoExtend.load(runs / "one")
    entries = [image_entry(0), text_entry(1), image_entry(3)]
    with torch.no_grad():
        seen = [model.language(batch, model.embed(batch)) for model in (before, after)
                for batch in [hearing_batch(model, entries)]]  # fmt: skip
    assert torch.equal(*seen)
    answers = [model.answer(hearing_batch(model, entries, generation=True)) for model in (before, after)]
    assert answers[0] == answers[1]


def test_two_processes_take_the_steps_of_one(runs: Path) -> None:
    expected, got = metrics(runs / "one"), metrics(runs / "two")
    for step, values in expected.items():
        assert got[step] == pytest.approx(values, rel=1e-3, nan_ok=True), f"step {step}"
    one, two = (load_file(runs / run / "delta.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(name.startswith("hearing.connector.") for name in one)
    assert not any(name.startswith("hearing.encoder.") for name in one)


def test_a_run_in_two_parts_ends_as_one_that_was_not_stopped(runs: Path) -> None:
    one, parts = (load_file(runs / run / "delta.safetensors") for run in ("one", "parts"))
    assert [name for name in one if not torch.equal(one[name], parts[name])] == []


def test_the_plan_of_its_costs_is_refused(runs: Path) -> None:
    with pytest.raises(UserError, match="`plan` does not know the costs of `hearing` yet"):
        read_stage(["--config", str(runs / "one.yaml")])


def test_packed_rows_teach_it_too(runs: Path) -> None:
    packed = [values[0] for values in metrics(runs / "packed").values()]
    assert sum(packed[-6:]) < 0.8 * sum(packed[:6])
