"""What learns is declared, applied before the optimizer exists, and shown."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan
from torch import nn

from callbacks.train_only import TrainOnly, parts_table
from moextend_pl.contracts import UserError


def test_named_parts_move_and_nothing_else_does(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    model = tiny_world.unbuilt()
    model.extension_plan = make_plan()
    trainer = make_trainer(TrainOnly(["projector", "new_experts"]), steps=2)
    before = {n: p.detach().clone() for n, p in tiny_world.model(make_plan()).named_parameters()}
    trainer.fit(model, tiny_world.datamodule())
    learning = {id(p) for name in ("projector", "new_experts") for p in model.parts()[name]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in learning), name
        assert torch.equal(parameter, before[name]) == (id(parameter) not in learning), name
    (optimizer,) = trainer.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == learning


def test_frozen_tower_stays_in_evaluation_mode_with_its_statistics(
    tiny_world: TinyWorld, make_trainer: Callable
) -> None:
    model = tiny_world.unbuilt()
    make_trainer(TrainOnly(["projector"]), steps=2).fit(model, tiny_world.datamodule())
    expected = tiny_world.model().encoder
    buffers = dict(expected.named_buffers())
    assert any("running_mean" in name for name in buffers)
    assert all(torch.equal(value, buffers[name]) for name, value in model.encoder.named_buffers())
    assert not any(part.training for part in model.encoder.modules())
    assert model.language.model.training


def test_table_lists_every_part_with_its_size(
    tiny_world: TinyWorld, make_trainer: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = tiny_world.unbuilt()
    make_trainer(TrainOnly(["projector"]), steps=1).fit(model, tiny_world.datamodule())
    for name, parameters in model.parts().items():
        count = sum(p.numel() for p in parameters)
        state = "learns" if name == "projector" else "frozen"
        line = rf"{name}\s+{count:,}\s+{count * 4 / 1e6:.2f}\s+float32\s+{state}"
        assert (re.search(line, caplog.text) is not None) == (count > 0), name
    total = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.projector.parameters())
    assert re.search(rf"total\s+{total:,}.*{learning:,} learn", caplog.text)


def test_table_tells_types_apart() -> None:
    table = parts_table({"a": [nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(500).bfloat16())], "none": []})
    assert re.search(r"a\s+1,500\s+0.01\s+bfloat16,float32\s+learns", table)
    assert "none" not in table


def test_part_that_does_not_exist_is_one_clear_mistake(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    with pytest.raises(UserError, match="got 'projektor'. Correct `TrainOnly.parts`"):
        make_trainer(TrainOnly(["projektor"])).fit(tiny_world.unbuilt(), tiny_world.datamodule())
    with pytest.raises(UserError, match="'new_experts' has no parameters in this run"):
        make_trainer(TrainOnly(["new_experts"])).fit(tiny_world.unbuilt(), tiny_world.datamodule())
