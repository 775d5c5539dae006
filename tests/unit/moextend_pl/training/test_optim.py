"""Learning rates, what learns, and what the optimizer holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny_world import make_plan, tiny_mixtral
from torch import nn

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.moe.extension.growth import grow, new_parameters
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.training.optim import (
    OptimSpec,
    PartOptim,
    apply_train_plan,
    build_optimizer,
    check_learnable,
    check_partition,
    learning_rate_factor,
    parameter_groups,
)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),  # warm-up of ten steps: the first is one tenth, never zero
        ("cosine", 4, 0.5),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.55),  # half way from 1 to 0.1
        ("cosine", 100, 0.1),
        ("cosine", 1000, 0.1),
        ("cosine", 32, 0.1 + 0.9 * 0.8596),  # (1 + cos(pi * 22 / 90)) / 2
        ("linear", 55, 0.55),
        ("linear", 82, 0.28),
        ("linear", 100, 0.1),
        ("constant", 4, 0.5),
        ("constant", 99, 1.0),
    ],
)
def test_learning_rate_curve(schedule: str, step: int, expected: float) -> None:
    spec = OptimSpec(warmup_fraction=0.1, schedule=schedule, final_fraction=0.1)
    assert learning_rate_factor(step, 100, spec) == pytest.approx(expected, abs=1e-4)


def test_run_of_one_step_and_of_nothing_but_warm_up_have_a_rate() -> None:
    assert learning_rate_factor(0, 1, OptimSpec()) == 1.0
    assert learning_rate_factor(9, 10, OptimSpec(warmup_fraction=1.0)) == 1.0
    assert learning_rate_factor(10, 10, OptimSpec(warmup_fraction=1.0)) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "`optim.lr` > 0, got 0.0"),
        ({"lr": float("nan")}, "`optim.lr` > 0"),
        ({"lr": float("inf")}, "`optim.lr` > 0"),
        ({"weight_decay": -0.1}, "`optim.weight_decay` >= 0, got -0.1"),
        ({"weight_decay": float("nan")}, "`optim.weight_decay` >= 0"),
        ({"betas": (0.9, 1.0)}, r"`optim.betas` in \[0, 1\), got \[0.9, 1.0\]"),
        ({"final_fraction": -0.5}, r"`optim.final_fraction` in \[0, 1\], got -0.5"),
        ({"schedule": "cos"}, "got 'cos'"),
        ({"warmup_fraction": 1.5}, r"in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_numbers_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimSpec(**change)


def test_impossible_number_of_a_part_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match=r"`optim.parts.encoder.lr` > 0, got -1"):
        OptimSpec(parts={"encoder": PartOptim(lr=-1.0)})


def two_parts() -> dict[str, list[nn.Parameter]]:
    return {"base": [nn.Parameter(torch.ones(2))], "new": [nn.Parameter(torch.ones(3))], "empty": []}


def test_planned_parts_learn_and_all_others_freeze() -> None:
    parts = two_parts()
    apply_train_plan(parts, TrainPlan(("new",)))
    assert [p.requires_grad for name in parts for p in parts[name]] == [False, True]
    apply_train_plan(parts, TrainPlan(("base",)))
    assert [p.requires_grad for name in parts for p in parts[name]] == [True, False]
    apply_train_plan(parts, None)
    assert all(p.requires_grad for name in parts for p in parts[name])


@pytest.mark.parametrize(
    ("names", "message"),
    [(("new", "knew"), "got 'knew'. Correct `TrainOnly.parts`"), (("empty",), "'empty' has no parameters in this run")],
)
def test_plan_of_parts_that_are_not_there_changes_nothing(names: tuple[str, ...], message: str) -> None:
    parts = two_parts()
    parts["base"][0].requires_grad_(False)
    with pytest.raises(UserError, match=message):
        apply_train_plan(parts, TrainPlan(names))
    assert [p.requires_grad for name in parts for p in parts[name]] == [False, True]


def test_parameter_in_no_part_or_in_two_is_noticed() -> None:
    module = nn.Linear(2, 2)
    check_partition(module, {"a": [module.weight], "b": [module.bias]})
    with pytest.raises(AssertionError, match="in no part"):
        check_partition(module, {"a": [module.weight]})
    with pytest.raises(AssertionError, match="in two parts"):
        check_partition(module, {"a": [module.weight, module.bias], "b": [module.bias]})


def test_optimizer_holds_exactly_what_learns_also_experts_copied_from_one_source() -> None:
    model = tiny_mixtral().requires_grad_(False)
    grow(model, make_plan(layers=(0, 1, 2), sources=(1, 1)), Reach())
    optimizer, _ = build_optimizer(model.parameters(), OptimSpec(), 10)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    expected = [id(p) for parameters in new_parameters(model).values() for p in parameters]
    assert sorted(held) == sorted(expected)
    # Two copies of one source are equal in value, and both have to move.
    experts = model.model.layers[0].mlp.experts.new
    assert torch.equal(experts.down_proj[0], experts.down_proj[1])
    before = experts.down_proj.detach().clone()
    experts.down_proj.grad = torch.ones_like(experts.down_proj)
    optimizer.step()
    assert (experts.down_proj != before).flatten(1).all(dim=1).tolist() == [True, True]


def test_weight_decay_and_rate_reach_the_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(2))
    spec = OptimSpec(lr=0.5, weight_decay=0.25, warmup_fraction=0.5, betas=(0.8, 0.9))
    optimizer, schedule = build_optimizer([parameter], spec, 4)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.25, 0.25, (0.8, 0.9))
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([1 - 0.25 * 0.25] * 2)
    schedule.step()
    assert group["lr"] == 0.5


BY_PART = OptimSpec(
    lr=0.1,
    weight_decay=0.5,
    warmup_fraction=0.0,
    schedule="constant",
    parts={"second": PartOptim(lr=0.02, weight_decay=0.0, warmup_fraction=0.5)},
)


def norm_and_linear(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    modules = {"first": nn.Linear(3, 4), "second": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))}
    return nn.ModuleDict(modules).to(dtype)


def parts_of(model: nn.ModuleDict) -> dict[str, list[nn.Parameter]]:
    return {name: list(module.parameters()) for name, module in model.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_learn_as_with_an_optimizer_of_their_own(dtype: torch.dtype) -> None:
    together, apart = norm_and_linear(dtype), norm_and_linear(dtype)
    optimizer, schedule = build_optimizer(parameter_groups(together, parts_of(together), BY_PART), BY_PART, 4)
    alone = [
        build_optimizer(apart[name].parameters(), replace(BY_PART, parts={}, **own), 4)
        for name, own in (("first", {}), ("second", {"lr": 0.02, "weight_decay": 0.0, "warmup_fraction": 0.5}))
    ]
    for _ in range(4):
        for pair in [(optimizer, schedule), *alone]:
            for group in pair[0].param_groups:
                for parameter in group["params"]:
                    parameter.grad = parameter.detach().sin()
            pair[0].step()
            pair[1].step()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(together["second"][1].weight, norm_and_linear(dtype)["second"][1].weight)


def test_without_decay_of_vectors_only_matrices_shrink() -> None:
    model = norm_and_linear(torch.float32)
    model["second"].register_parameter("experts_bias", nn.Parameter(torch.ones(4, 8)))
    spec = OptimSpec(lr=0.1, weight_decay=0.5, decay_vectors=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, _ = build_optimizer(parameter_groups(model, parts_of(model), spec), spec, 4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"first.weight", "second.1.weight"}


def test_all_learns_in_one_group_in_the_order_of_the_module_by_default() -> None:
    model = norm_and_linear(torch.float32)
    model["second"][0].requires_grad_(False)
    (group,) = parameter_groups(model, parts_of(model), OptimSpec())
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
    assert "name" not in group


@pytest.mark.parametrize("plan", [TrainPlan(("first",)), None])
def test_numbers_for_a_part_that_does_not_learn_are_refused(plan: TrainPlan | None) -> None:
    with pytest.raises(UserError, match=r"`optim.parts` to name parts that learn .*got 'second'"):
        check_learnable(["second"], plan, BY_PART)
    model = norm_and_linear(torch.float32)
    model["second"].requires_grad_(False)
    with pytest.raises(UserError, match=r"`optim.parts` to name parts that learn, among .*got 'second'"):
        parameter_groups(model, parts_of(model), BY_PART)


def test_nothing_that_learns_and_no_steps_are_refused() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(UserError, match="at least one part that learns"):
        build_optimizer([frozen], OptimSpec(), 10)
    with pytest.raises(UserError, match="`trainer.max_steps` > 0, got -1"):
        build_optimizer([nn.Parameter(torch.ones(2))], OptimSpec(), -1)
