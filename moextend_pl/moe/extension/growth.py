"""Applies an extension plan to a model, names what is new, and takes it off again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moextend_pl.contracts import ExtensionPlan, LayerGrowth, UserError
from moextend_pl.moe.blocks import EXPERTS, MoEBlock, find_blocks, list_blocks
from moextend_pl.moe.extension.calibration import Calibration
from moextend_pl.moe.extension.extended_experts import ExtendedExperts
from moextend_pl.moe.extension.extended_router import ExtendedRouter
from moextend_pl.moe.extension.reach import Reach
from moextend_pl.moe.families import RouterFacts, read_facts

NEW_PARTS = ("new_experts", "new_routers", "calibration")
EARLIER_PART = "earlier_extensions"


def _facts(block: MoEBlock) -> RouterFacts:
    return (
        block.router.facts if isinstance(block.router, ExtendedRouter) else read_facts(block.router, block.num_experts)
    )


def _check_growth(block: MoEBlock, growth: LayerGrowth, plan: ExtensionPlan) -> None:
    if max(growth.sources) >= block.num_experts:
        raise UserError(
            f"Layer {growth.layer} has {block.num_experts} experts, the plan asks to copy expert "
            f"{max(growth.sources)}. Expected source experts in 0..{block.num_experts - 1}."
        )
    groups = _facts(block).scoring.groups
    if groups > 1 and plan.init == "copy":
        raise UserError(
            f"Layer {growth.layer} selects within {groups} groups of experts of equal size, which a new expert that "
            "competes with all others would upset. Set `init: preserving`, where it stands for its source."
        )


def check_plan(blocks: Sequence[MoEBlock], plan: ExtensionPlan) -> None:
    """Refuses a plan that does not fit the model, before anything is changed.

    Args:
        blocks: As found by `find_blocks`.
        plan: The plan to apply.

    Raises:
        UserError: If a layer has no experts, a source expert does not exist, or the family's router cannot
            be extended in this way.
    """
    by_layer = {block.layer: block for block in blocks}
    for growth in plan.layers:
        if growth.layer not in by_layer:
            raise UserError(
                f"Expected the layers of the extension plan among the mixture-of-experts layers {sorted(by_layer)}, "
                f"got {growth.layer}. Write the plan with a probe of this model."
            )
        _check_growth(by_layer[growth.layer], growth, plan)


def grow(model: nn.Module, plan: ExtensionPlan, reach: Reach) -> None:
    """Adds the plan's new experts, router rows and calibration to a model, in place.

    A model that is extended already is extended further: its layers are wrapped once more, and its new
    experts count as old ones.

    Args:
        model: A transformers mixture-of-experts model.
        plan: Which layers grow from which experts.
        reach: Mask shared by the layers of this plan.

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
    if plan.calibration != "none":
        seed = plan.seed + growth.layer
        calibration = Calibration(block.num_experts, len(growth.sources), form=plan.calibration, seed=seed)
        calibration.to(next(block.router.parameters()).device)
    facts = _facts(block)
    experts = ExtendedExperts(block.experts, growth.sources, reach)
    router = ExtendedRouter(
        block.router, facts, growth.sources, reach, init=plan.init, calibration=calibration, experts=experts.root
    )
    setattr(block.module, block.router_name, router)
    setattr(block.module, EXPERTS, experts)


def strip(model: nn.Module) -> None:
    """Takes every new part off a model, in place, and leaves the base as it was.

    Args:
        model: A model grown by `grow`, once or more, or a stock one.
    """
    for block in find_blocks(model):
        if isinstance(block.router, ExtendedRouter):
            experts: Any = block.experts
            assert isinstance(experts, ExtendedExperts)
            setattr(block.module, block.router_name, block.router.root)
            setattr(block.module, EXPERTS, experts.root)
            stock: Any = experts.root
            stock._is_expert_parallel = False


def extensions(model: nn.Module) -> Iterator[ExtendedRouter | ExtendedExperts]:
    """Yields every extended router and experts module of a model, wrapped ones included."""
    for module in model.modules():
        if isinstance(module, ExtendedRouter | ExtendedExperts):
            yield module


def new_parameters(model: nn.Module, latest: Reach | None = None) -> dict[str, list[nn.Parameter]]:
    """Collects the parameters that extensions added.

    Args:
        model: A model, grown or not.
        latest: Mask of the extension that is in work; None if there is only one.

    Returns:
        Parameters by part: `new_experts`, `new_routers`, `calibration` of the latest extension, and
        `earlier_extensions`; empty lists if not grown.
    """
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in (*NEW_PARTS, EARLIER_PART)}
    for module in extensions(model):
        for name, parameters in module.new_parameters().items():
            parts[name if latest in (None, module.reach) else EARLIER_PART].extend(parameters)
    return parts


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of the base's own routers, extended or not."""
    routers = [block.router for block in list_blocks(model)]
    bases = [router.root if isinstance(router, ExtendedRouter) else router for router in routers]
    return [parameter for base in bases for parameter in base.parameters()]
