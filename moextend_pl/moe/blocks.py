"""Finds mixture-of-experts blocks in a transformers model by their structure, not by class names.

Since transformers v5 such a block holds a router, which maps hidden states to `(logits, weights,
indices)`, and an `experts` module with the weights of all experts in 3-D tensors, called as
`experts(hidden, indices, weights)`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moextend_pl.contracts import UserError
from moextend_pl.moe.families import router_weight

EXPERTS = "experts"


@dataclass(frozen=True)
class MoEBlock:
    """One mixture-of-experts block of a decoder.

    Attributes:
        layer: 0-based index of the decoder layer, dense layers included.
        path: Dotted name of the block inside the model.
        module: The block itself.
        router_name: Name of the router among the block's children.
    """

    layer: int
    path: str
    module: nn.Module
    router_name: str

    @property
    def router(self) -> nn.Module:
        """The router as it stands now, extended or not."""
        return self.module.get_submodule(self.router_name)

    @property
    def experts(self) -> nn.Module:
        """The experts as they stand now, extended or not."""
        return self.module.get_submodule(EXPERTS)

    @property
    def num_experts(self) -> int:
        """Number of experts as it stands now, new ones included."""
        return expert_count(self.experts)


def expert_count(experts: nn.Module) -> int:
    """Returns the number of experts that a module holds, or 0 if it is no experts module."""
    count = getattr(experts, "num_experts", 0)
    if not isinstance(count, int):
        return 0
    stacked = [p for p in experts.parameters(recurse=True) if p.dim() == 3]
    return count if stacked else 0


def _router_name(block: nn.Module, num_experts: int) -> str | None:
    for name, child in block.named_children():
        # A plain Linear gate belongs to a block that routes by itself; it does not follow the protocol.
        if name == EXPERTS or type(child) is nn.Linear:
            continue
        wrapped = hasattr(child, "base") and getattr(child, "num_experts", None) == num_experts
        if wrapped or router_weight(child, num_experts) is not None:
            return name
    return None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the layers of a transformers model, none of them inside of another."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    return layers


def list_blocks(model: nn.Module) -> list[MoEBlock]:
    """Lists the mixture-of-experts blocks of a model by rising layer; none where it is dense.

    Args:
        model: A transformers model, grown or not.
    """
    found = []
    for path, module in model.named_modules():
        count = expert_count(getattr(module, EXPERTS, nn.Identity()))
        router = _router_name(module, count) if count else None
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        if router is not None and numbers:
            found.append(MoEBlock(layer=numbers[-1], path=path, module=module, router_name=router))
    return sorted(found, key=lambda block: block.layer)


def find_blocks(model: nn.Module) -> list[MoEBlock]:
    """Lists the mixture-of-experts blocks of a model by rising layer.

    Args:
        model: A transformers model, grown or not.

    Returns:
        One entry for each decoder layer that has experts.

    Raises:
        UserError: If the model has no such block.
    """
    found = list_blocks(model)
    if not found:
        holders = {type(m).__name__ for m in model.modules() if expert_count(getattr(m, EXPERTS, nn.Identity()))}
        leaves = sorted({type(child).__name__ for child in model.modules() if not list(child.children())})
        what = (
            f"experts in {sorted(holders)} whose router has not one row for each, or is not a module of its own"
            if holders
            else f"no experts but {leaves}"
        )
        raise UserError(
            "Expected a mixture-of-experts model whose blocks hold a router and an `experts` module with 3-D weights, "
            f"got {type(model).__name__} with {what}. Name a transformers v5 mixture-of-experts model as the base."
        )
    return found
