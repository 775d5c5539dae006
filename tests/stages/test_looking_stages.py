"""A stage whose words look at tiles (NVLM-H) takes the steps of one process on two, however these share the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.ranks import run_rounds
from helpers.stages import metrics, write_stage
from helpers.tiles import SIZES, as_file, photo, tiled, write_tagged_base
from helpers.tiny_world import QUESTION, TinyWorld, make_plan, perturb
from safetensors.torch import load_file

from datamodules.shards import Entry, conversation, write_shards
from moextend_pl import cli
from moextend_pl.contracts import TrainPlan
from moextend_pl.models.delta import save_delta

pytestmark = pytest.mark.slow
STEPS = 4
WAYS = ("ddp", "fsdp2", "expert_parallel")


def write_mixed(folder: Path) -> str:
    """Pictures of many shapes, and texts alone, so that a process has no picture where another one has."""
    folder.mkdir()
    entries = []
    for number in range(16):
        files = (as_file(photo(SIZES[number % 5], number)),) if number % 3 else ()
        entries.append(Entry(f"s{number:02d}", conversation(("<image>\n" * len(files) + QUESTION, "red")), files))
    write_shards(entries, folder, 4)
    return str(folder)


def test_two_processes_take_the_steps_of_one_however_they_share(tiny_world: TinyWorld, tmp_path: Path) -> None:
    base, data, plan = (
        write_tagged_base(tiny_world, tmp_path / "base"),
        write_mixed(tmp_path / "set"),
        make_plan(init="copy"),
    )
    plan.save(tmp_path / "plan.yaml")
    start = tiled(tiny_world, base, looks=1, thumbnail=True)
    start.extension_plan, start.train_plan = plan, TrainPlan(("projector", "new_experts", "new_routers", "calibration"))
    start.configure_model()
    perturb([p for part in start.train_plan.parts for p in start.parts()[part]], 0.1)
    save_delta(start, tmp_path / "start")

    def command(way: str, *options: str) -> list[str]:
        run = tmp_path / way
        options_of_stage = {"plan": tmp_path / "plan.yaml", "init_from": tmp_path / "start", "steps": STEPS}
        path = write_stage(tiny_world, run, "extend", every=STEPS, **options_of_stage)
        config = yaml.safe_load(path.read_text())
        arguments = config["model"]["init_args"]
        arguments["encoder"]["features"] = {"tiles": 6}
        arguments["language"]["base"] = base
        arguments["projector"].update(cross_attention=1, thumbnail=True)
        config["data"]["init_args"].update(train=data, batch_size=4, rows={"max_length": 128})
        path.write_text(yaml.safe_dump(config))
        return ["fit", "--config", str(path), "--model.optim.lr=1e-4", "--model.optim.schedule=constant", *options]

    cli.run(command("one", "--trainer.devices=1"))
    two = [command(way, "--trainer.devices=2", f"--trainer.strategy={way}") for way in WAYS]
    run_rounds([(2, two)], tmp_path)
    losses, delta = metrics(tmp_path / "one"), load_file(tmp_path / "one" / "delta.safetensors")
    assert len(losses) == STEPS
    for way in WAYS:
        found = metrics(tmp_path / way)
        assert found.keys() == losses.keys()
        for step, values in found.items():
            assert values == pytest.approx(losses[step], abs=1e-5), f"{way}, step {step}"
        there = load_file(tmp_path / way / "delta.safetensors")
        assert there.keys() == delta.keys()
        assert max(float((there[name] - value).abs().max()) for name, value in delta.items()) < 1e-4, way
