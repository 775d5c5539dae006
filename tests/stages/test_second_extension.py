"""Two extend stages after each other, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.stages import write_stage
from helpers.tiny_world import EXPERTS, TinyWorld, make_plan
from safetensors.torch import load_file

from moextend_pl import cli
from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import read_manifest


def extend(world: TinyWorld, folder: Path, name: str, start: Path | None, *arguments: str) -> Path:
    config = write_stage(world, folder / name, "extend", init_from=start, plan=folder / "plan.yaml")
    cli.run(["fit", "--config", str(config), *arguments])
    return folder / name


def test_second_stage_extends_the_model_of_the_first_by_a_plan_written_by_hand(
    tiny_world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_plan((0, 2)).save(tmp_path / "plan.yaml")
    (tmp_path / "by_hand.yaml").write_text(
        f"schema: 1\nlayers:\n- {{layer: 1, sources: [0]}}\n- {{layer: 2, sources: [{EXPERTS}, 3]}}\nrouting: open\n"
    )
    first = extend(tiny_world, tmp_path, "first", None)
    assert "the projector learns" not in caplog.text
    second = extend(tiny_world, tmp_path, "second", first, "--plan", str(tmp_path / "by_hand.yaml"))
    assert "the projector learns" in caplog.text
    plans = read_manifest(second).plans
    assert [[growth.layer for growth in plan.layers] for plan in plans] == [[0, 2], [1, 2]]
    assert json.loads((second / "frozen.json").read_text())["unchanged"]
    model, before = MoExtend.load(second), load_file(first / "delta.safetensors")
    earlier = model.parts()["earlier_extensions"]
    trained = [t for name, t in before.items() if "projector" not in name]
    assert len(earlier) == len(trained)
    for parameter in earlier:
        assert any(parameter.shape == t.shape and torch.equal(parameter, t) for t in trained)


def test_second_stage_continues_after_an_interruption(tiny_world: TinyWorld, tmp_path: Path) -> None:
    make_plan((2,)).save(tmp_path / "plan.yaml")
    first = extend(tiny_world, tmp_path, "first", None)
    make_plan((2,), (EXPERTS,)).save(tmp_path / "plan.yaml")
    whole = extend(tiny_world, tmp_path, "whole", first)
    cut = extend(tiny_world, tmp_path, "cut", first, "--trainer.limit_train_batches=4", "--trainer.max_epochs=1")
    assert json.loads((cut / "stage.json").read_text())["steps"] < 8
    cli.run(["fit", "--config", str(tmp_path / "cut.yaml")])
    assert (cut / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()


def test_plan_for_a_stage_that_reads_none_is_one_clear_mistake(tiny_world: TinyWorld, tmp_path: Path) -> None:
    config = write_stage(tiny_world, tmp_path / "align", "align")
    with pytest.raises(UserError, match="`--plan` needs a stage with an ExpertExtension"):
        cli.run(["fit", "--config", str(config), "--plan", "plan.yaml"])
