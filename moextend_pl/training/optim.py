"""Optimizer and learning-rate schedule of a stage, over the parameters that learn and no others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.runs.sharded import local
from moextend_pl.training.master_adamw import MasterAdamW

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class PartOptim:
    """What one part of the model learns with; None is what `optim` says for all.

    Attributes:
        lr: Highest learning rate.
        weight_decay: Decoupled weight decay.
        warmup_fraction: Share of all steps of its warm-up.
    """

    lr: float | None = None
    weight_decay: float | None = None
    warmup_fraction: float | None = None


@dataclass(frozen=True)
class OptimSpec:
    """Numbers of AdamW and its schedule.

    Attributes:
        lr: Highest learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of the two moments.
        warmup_fraction: Share of all steps over which the rate rises linearly from 0.
        schedule: What follows the warm-up: `cosine`, `linear` or `constant`.
        final_fraction: Share of `lr` that is left at the last step of `cosine` and `linear`.
        parts: What differs for a part, by the names that `TrainOnly.parts` uses.
        decay_vectors: Whether weight decay reaches biases, and norms and other parameters of one dimension.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = 0.03
    schedule: str = "cosine"
    final_fraction: float = 0.0
    parts: dict[str, PartOptim] = field(default_factory=dict)
    decay_vectors: bool = True

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            try:
                self.of(part)
            except UserError as error:
                raise UserError(str(error).replace("`optim.", f"`optim.parts.{name}.")) from None
        if not 0 < self.lr < math.inf:
            raise UserError(f"Expected `optim.lr` > 0, got {self.lr}.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"Expected `optim.weight_decay` >= 0, got {self.weight_decay}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"Expected `optim.betas` in [0, 1), got {list(self.betas)}.")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"Expected `optim.final_fraction` in [0, 1], got {self.final_fraction}.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"Expected `optim.schedule` in {list(SCHEDULES)}, got {self.schedule!r}.")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"Expected `optim.warmup_fraction` in [0, 1], got {self.warmup_fraction}.")

    def of(self, part: PartOptim) -> OptimSpec:
        """Returns the numbers of a part."""
        own = {each.name: getattr(part, each.name) for each in fields(part)}
        return replace(self, parts={}, **{name: value for name, value in own.items() if value is not None})


def learning_rate_factor(step: int, total_steps: int, spec: OptimSpec) -> float:
    """Returns the share of `spec.lr` in force at a step.

    Args:
        step: Optimizer steps taken so far.
        total_steps: Optimizer steps of the whole run.
        spec: The schedule.

    Returns:
        A factor in [0, 1].

    Example:
        >>> learning_rate_factor(50, 100, OptimSpec(warmup_fraction=0.0))
        0.5
    """
    warmup = round(spec.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if spec.schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if spec.schedule == "cosine" else 1 - progress
    return spec.final_fraction + (1 - spec.final_fraction) * left


def check_steps(total_steps: int) -> None:
    """Refuses a run without an end.

    Args:
        total_steps: `trainer.max_steps`.

    Raises:
        UserError: If it is not set.
    """
    if total_steps <= 0:
        raise UserError(f"Expected `trainer.max_steps` > 0, got {total_steps}. Set it in the stage file.")


def check_learnable(frozen: Collection[str], plan: TrainPlan | None, spec: OptimSpec) -> None:
    """Refuses a plan that asks a part to learn that cannot, before any weight is read.

    Args:
        frozen: Names of the parts that cannot learn.
        plan: Names of the parts that learn; None asks for none by name.
        spec: Whose `parts` have to be among them.

    Raises:
        UserError: If the plan names one of them, or `spec` a part that does not learn.
    """
    for name in spec.parts:
        if name in frozen or (plan is not None and name not in plan.parts):
            learning = "all but " + str(sorted(frozen)) if plan is None else str(sorted(plan.parts))
            raise UserError(
                f"Expected `optim.parts` to name parts that learn ({learning}), got {name!r}. Correct the name, or add "
                "it to `TrainOnly.parts`."
            )
    asked = sorted(set(plan.parts) & set(frozen)) if plan is not None else []
    if asked:
        raise UserError(
            f"The part {asked[0]!r} is held in 4 bits (`quantize`) and cannot learn. Remove it from `TrainOnly.parts`, "
            "or remove `quantize`."
        )


def apply_train_plan(
    parts: Mapping[str, list[nn.Parameter]], plan: TrainPlan | None, frozen: Collection[str] = ()
) -> None:
    """Lets the planned parts learn and freezes all others.

    Args:
        parts: Every parameter of the model in exactly one part.
        plan: Names of the parts that learn; None lets everything learn that can.
        frozen: Names of the parts that cannot.

    Raises:
        UserError: If the plan names a part that the model does not have, or one without parameters.
    """
    names = set(parts) - set(frozen) if plan is None else set(plan.parts)
    for name in sorted(names):
        if name not in parts:
            raise UserError(f"Expected parts to train among {sorted(parts)}, got {name!r}. Correct `TrainOnly.parts`.")
        if plan is not None and not parts[name]:
            raise UserError(
                f"The part {name!r} has no parameters in this run. New experts, routers and calibration exist only "
                "under an extension plan: add the ExpertExtension callback with `plan`, or correct `TrainOnly.parts`."
            )
    for name, parameters in parts.items():
        for parameter in parameters:
            parameter.requires_grad_(name in names)


def check_partition(module: nn.Module, parts: Mapping[str, list[nn.Parameter]]) -> None:
    """Asserts that every parameter of the module is in exactly one part."""
    listed = [id(parameter) for parameters in parts.values() for parameter in parameters]
    missing = [name for name, parameter in module.named_parameters() if id(parameter) not in set(listed)]
    assert len(listed) == len(set(listed)), "a parameter is in two parts of the model"
    assert not missing, f"parameters in no part of the model: {missing[:5]}"


def parameter_groups(
    module: nn.Module, parts: Mapping[str, list[nn.Parameter]], spec: OptimSpec
) -> list[dict[str, Any]]:
    """Sorts what learns by what it learns with.

    Args:
        module: Whose parameters in whose order.
        parts: Every parameter in exactly one part.
        spec: One group where it names no parts and decays all alike.

    Returns:
        Groups as torch's optimizers take them, none empty, each with its `warmup_fraction`, and with its `name` where
        there are several.

    Raises:
        UserError: If `spec.parts` names a part that the model does not have or that does not learn.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    part_of = {id(p): part for part, parameters in parts.items() for p in parameters if part in spec.parts}
    unused = set(spec.parts) - {part_of[id(p)] for p in named.values() if id(p) in part_of}
    if unused:
        raise UserError(
            f"Expected `optim.parts` to name parts that learn, among {sorted(parts)}, got {min(unused)!r}. Correct it."
        )
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        is_vector = parameter.ndim < 2 or name.rsplit(".", 1)[-1].endswith("bias")
        decays = spec.decay_vectors or not is_vector
        groups.setdefault((part_of.get(id(parameter), "rest"), decays), []).append(parameter)
    found = [_group(part, decays, params, spec) for (part, decays), params in groups.items()]
    # LearningRateMonitor names its columns by them.
    return found if len(found) > 1 else [{key: value for key, value in each.items() if key != "name"} for each in found]


def _group(part: str, decays: bool, params: list[nn.Parameter], spec: OptimSpec) -> dict[str, Any]:
    own = spec.of(spec.parts.get(part, PartOptim()))
    return {
        "name": part if decays else f"{part}_no_decay",
        "params": params,
        "lr": own.lr,
        "weight_decay": own.weight_decay if decays else 0.0,
        "warmup_fraction": own.warmup_fraction,
    }


class FusedAdamW(AdamW):
    """AdamW that updates all parameters in one call, and none where `found_inf` says so on the device.

    A tiny model spends its step in calls, not in arithmetic. Lightning refuses to clip gradients of an optimizer that
    also takes the scale of float16 off by itself, which this one leaves to the scaler. Each number is updated by
    itself, so that a rank updates its part of what is sharded, in one call with what is whole.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: list[dict[str, Any]], **numbers: Any) -> None:
        super().__init__(params, **numbers, fused=True)
        self._step_supports_amp_scaling = False

    def _init_group(self, group: dict[str, Any], *gathered: list[Tensor]) -> bool:
        has_complex = bool(super()._init_group(group, *gathered))
        for tensors in gathered:
            tensors[:] = map(local, tensors)
        return has_complex


def build_optimizer(
    parameters: Iterable[nn.Parameter | dict[str, Any]], spec: OptimSpec, total_steps: int
) -> tuple[Optimizer, LambdaLR]:
    """Builds AdamW over the learning parameters, with its schedule; with master copies in fp32 where they are half.

    Args:
        parameters: Parameters of the model, of which frozen ones are left out, or groups of what learns.
        spec: Numbers of optimizer and schedule.
        total_steps: Optimizer steps of the whole run.

    Returns:
        The optimizer, and the scheduler to be stepped once after each optimizer step.

    Raises:
        UserError: If nothing learns or the number of steps is not set.
    """
    given = list(parameters)
    groups = [group for group in given if isinstance(group, dict)]
    if not groups:
        groups = [{"params": [p for p in given if isinstance(p, nn.Parameter) and p.requires_grad]}]
    learning = [parameter for group in groups for parameter in group["params"]]
    if not learning:
        raise UserError("Expected at least one part that learns, got none. List parts in `TrainOnly.parts`.")
    check_steps(total_steps)
    half = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in learning)
    kind = MasterAdamW if half else FusedAdamW
    optimizer: Optimizer = kind(groups, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    specs = [replace(spec, warmup_fraction=group.get("warmup_fraction", spec.warmup_fraction)) for group in groups]
    return optimizer, LambdaLR(
        optimizer, [partial(learning_rate_factor, total_steps=total_steps, spec=own) for own in specs]
    )
