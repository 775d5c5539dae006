"""A frozen tensor that changes is an error, whoever changed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan
from lightning.pytorch import Callback, Trainer

from callbacks.frozen_guard import FrozenGuard
from callbacks.train_only import TrainOnly
from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend


class Meddle(Callback):
    """Changes one number of a frozen part during the second step."""

    def __init__(self, part: str) -> None:
        self.part = part

    def on_train_batch_end(self, trainer: Trainer, pl_module: MoExtend, *_: Any) -> None:
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.parts()[self.part][0].view(-1)[0] += 1e-7


def test_run_that_keeps_the_base_gets_a_receipt(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> None:
    model = tiny_world.unbuilt()
    model.extension_plan = make_plan()
    parts = ["projector", "new_experts"]
    make_trainer(TrainOnly(parts), FrozenGuard(), steps=3).fit(model, tiny_world.datamodule())
    receipt = json.loads((tmp_path / "run" / "frozen.json").read_text())
    assert receipt["unchanged"] is True
    running = [name for name in model.state_dict() if "running_" in name or "num_batches" in name]
    assert running
    assert receipt["tensors"] == sum(not p.requires_grad for p in model.parameters()) + len(running)


@pytest.mark.parametrize("part", ["encoder", "language", "routers"])
def test_changed_frozen_tensor_is_an_error_and_gives_no_receipt(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path, part: str
) -> None:
    trainer = make_trainer(TrainOnly(["projector"]), FrozenGuard(), Meddle(part), steps=3)
    with pytest.raises(RuntimeError, match="1 of .* frozen tensors changed"):
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    assert not (tmp_path / "run" / "frozen.json").exists()


class MoveStatistics(Callback):
    """Runs a frozen layer in train mode, as a tower that was forgotten in it would."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: MoExtend, *_: Any) -> None:
        next(b for name, b in pl_module.encoder.named_buffers() if "running_mean" in name).add_(1e-3)


def test_changed_statistics_of_a_frozen_tower_are_an_error(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    trainer = make_trainer(TrainOnly(["projector"]), FrozenGuard(), MoveStatistics(), steps=2)
    with pytest.raises(RuntimeError, match="running_mean"):
        trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())


def test_learning_tensors_may_change(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    trainer = make_trainer(TrainOnly(["projector", "routers"]), FrozenGuard(), Meddle("routers"), steps=3)
    trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())


def test_resumed_run_compares_with_its_first_start(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    model = tiny_world.model(parts=["projector"])
    first, second = FrozenGuard(), FrozenGuard()
    first.on_fit_start(make_trainer(), model)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model.parts()["language"][0][0] += 1.0
    with pytest.raises(UserError, match="not those that this run began with"):
        second.on_fit_start(make_trainer(), model)
