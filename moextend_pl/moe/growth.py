"""Applies an extension plan to a model, names what is new, and takes it off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UserError
from moextend_pl.moe.blocks import EXPERTS, MoEBlock, find_blocks
from moextend_pl.moe.calibration import Calibration
from moextend_pl.moe.extended import ExtendedExperts, ExtendedRouter, Reach

NEW_PARTS = ("new_experts", "new_routers", "calibration")


def check_plan(blocks: Sequence[MoEBlock], plan: ExtensionPlan) -> None:
    """Refuses a plan that does not fit the model, before anything is changed.

    Args:
        blocks: As found by `find_blocks`.
        plan: The plan to apply.

    Raises:
        UserError: If a layer has no experts, is extended already, or a source expert does not exist.
    """
    by_layer = {block.layer: block for block in blocks}
    for growth in plan.layers:
        block = by_layer.get(growth.layer)
        if block is None:
            raise UserError(
                f"Expected the layers of the extension plan among the mixture-of-experts layers {sorted(by_layer)}, "
                f"got {growth.layer}. Write the plan with a probe of this model."
            )
        if isinstance(block.router, ExtendedRouter):
            raise UserError(f"Layer {growth.layer} is extended already. Load the base anew to apply another plan.")
        if max(growth.sources) >= block.num_experts:
            raise UserError(
                f"Layer {growth.layer} has {block.num_experts} experts, the plan asks to copy expert "
                f"{max(growth.sources)}. Expected source experts in 0..{block.num_experts - 1}."
            )


def grow(model: nn.Module, plan: ExtensionPlan, reach: Reach) -> None:
    """Adds the plan's new experts, router rows and calibration to a model, in place.

    Args:
        model: A transformers mixture-of-experts model.
        plan: Which layers grow from which experts.
        reach: Mask shared by all extended layers.

    Raises:
        UserError: If the plan does not fit the model.
    """
    blocks = find_blocks(model)
    check_plan(blocks, plan)
    by_layer = {block.layer: block for block in blocks}
    for growth in plan.layers:
        _grow_block(by_layer[growth.layer], growth, plan, reach)


def _grow_block(block: MoEBlock, growth: LayerGrowth, plan: ExtensionPlan, reach: Reach) -> None:
    calibration = None
    if plan.calibration == "additive":
        calibration = Calibration(block.num_experts, len(growth.sources), seed=plan.seed + growth.layer)
        calibration.to(next(block.router.parameters()).device)
    router = ExtendedRouter(block.router, growth.sources, reach, init=plan.init, calibration=calibration)
    experts = ExtendedExperts(block.experts, growth.sources, reach)
    setattr(block.module, block.router_name, router)
    setattr(block.module, EXPERTS, experts)


def strip(model: nn.Module) -> None:
    """Takes every new part off a model, in place, and leaves the base as it was.

    Args:
        model: A model grown by `grow`, or a stock one.
    """
    for block in find_blocks(model):
        if isinstance(block.router, ExtendedRouter):
            setattr(block.module, block.router_name, block.router.base)
            experts: Any = block.experts.base
            experts._is_expert_parallel = False
            setattr(block.module, EXPERTS, experts)


def new_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Collects the parameters that the extension added.

    Args:
        model: A model, grown or not.

    Returns:
        Parameters by part: `new_experts`, `new_routers`, `calibration`; empty lists if not grown.
    """
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in NEW_PARTS}
    for module in model.modules():
        if isinstance(module, (ExtendedRouter, ExtendedExperts)):
            for name, parameters in module.new_parameters().items():
                parts[name].extend(parameters)
    return parts


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of the base's own routers, extended or not."""
    routers = [block.router for block in find_blocks(model)]
    bases = [router.base if isinstance(router, ExtendedRouter) else router for router in routers]
    return [parameter for base in bases for parameter in base.parameters()]
