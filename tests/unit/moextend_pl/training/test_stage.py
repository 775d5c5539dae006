"""What every stage module shares: built once, frozen by plan, checkpoints without the frozen base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan
from lightning.pytorch import Trainer

from moextend_pl.contracts import TrainPlan, UserError

PARTS = ("projector", "new_experts", "new_routers", "calibration")


def test_building_twice_does_nothing(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(), PARTS)
    before = list(model.named_parameters())
    model.train_plan = TrainPlan(("encoder",))
    model.configure_model()
    assert [(n, id(p), p.requires_grad) for n, p in before] == [
        (n, id(p), p.requires_grad) for n, p in model.named_parameters()
    ]


def test_fresh_weights_depend_on_the_seed_alone(tiny_world: TinyWorld) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        model = tiny_world.unbuilt()
        model.init_seed = seed
        model.configure_model()
        states.append(model.projector.layers[0].weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_run_without_an_end_is_refused_before_anything_is_read(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = tiny_world.unbuilt()
    trainer = Trainer(max_epochs=-1, accelerator="cpu", logger=False, default_root_dir=tmp_path, barebones=True)
    with pytest.raises(UserError, match=r"`trainer.max_steps` > 0, got -1"):
        trainer.fit(model, datamodule=tiny_world.datamodule())
    assert list(model.language.parameters()) == []


def test_frozen_parameters_get_no_gradient_and_learning_ones_do(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(), PARTS)
    model(tiny_world.batch(model, "itit")).loss.backward()
    learning = {id(p) for name in PARTS for p in model.parts()[name]}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in learning), name
        assert parameter.requires_grad == (id(parameter) in learning), name


def test_parts_are_a_partition(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(sources=(0, 1)))
    listed = [id(p) for parameters in model.parts().values() for p in parameters]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert set(model.parts()) == {"encoder", "encoder_unread", "language", "routers", "earlier_extensions", *PARTS}


def test_checkpoint_holds_what_learns_and_nothing_frozen(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(), PARTS)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning <= set(checkpoint["state_dict"])
    assert not frozen & set(checkpoint["state_dict"])
    model.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (make_plan([0]), PARTS),
        (make_plan([0, 1, 2]), PARTS),
        (None, ("projector",)),
        (make_plan(), ("projector",)),
        (make_plan(calibration="none"), PARTS[:3]),
    ],
    ids=["fewer layers", "more layers", "not grown", "other parts", "no calibration"],
)
@pytest.mark.parametrize("older", [False, True])
def test_checkpoint_of_another_plan_is_refused_before_any_weight_is_read(
    tiny_world: TinyWorld, plan: object, parts: tuple[str, ...], older: bool
) -> None:
    checkpoint = {"state_dict": tiny_world.model(make_plan(), PARTS).state_dict()}
    tiny_world.model(make_plan(), PARTS).on_save_checkpoint(checkpoint)
    if older:
        del checkpoint["sources"]
    other = tiny_world.model(plan, parts)
    message = r"does not fit this run.*Resuming needs the same extension plan"
    if not older and plan != make_plan():
        message = r"was made from something else: plan\.(layers|calibration|init) was .*, now"
    with pytest.raises(UserError, match=message):
        other.on_load_checkpoint(checkpoint)
