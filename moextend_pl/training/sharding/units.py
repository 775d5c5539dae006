"""What is sharded together: one decoder layer at a time, whose experts all ranks compute together; or experts."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

from moextend_pl.contracts import UserError
from moextend_pl.moe.blocks import decoder_layers, find_blocks
from moextend_pl.moe.parallel import exchange
from moextend_pl.moe.parallel.cut import check_cut, cut, of_whole
from moextend_pl.training.half_precision import exact_places


def language_of(module: nn.Module) -> PreTrainedModel | None:
    """Returns the model that predicts words: the transformers model with a head; None where there is none."""
    models = (each for each in module.modules() if isinstance(each, PreTrainedModel))
    return next((each for each in models if each.get_output_embeddings() is not None), None)


def kept_whole(model: PreTrainedModel) -> set[nn.Parameter]:
    """Returns the parameters that every rank holds whole.

    Embeddings, which are also read outside of the model's own pass; what has its own type in a model of 16 bits; and
    single numbers, which cannot be cut.

    Args:
        model: A transformers model.
    """
    exact = [getattr(module, name) for module, name in exact_places(model)]
    single = [parameter for parameter in model.parameters() if not parameter.dim()]
    found = chain(model.get_input_embeddings().parameters(), exact, single)
    return {parameter for parameter in found if isinstance(parameter, nn.Parameter)}


def parameters_by_unit(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """Returns what ranks share of each decoder layer, and in the last place of what stands around the layers.

    Args:
        model: A transformers model that is not sharded yet.
    """
    known, units = kept_whole(model), []
    for unit in (*decoder_layers(model), model):
        units.append([parameter for parameter in unit.parameters() if parameter not in known])
        known.update(units[-1])
    return units


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leaves each rank its part of the weights of every decoder layer, and of what stands around them, in place.

    Every layer is gathered when it computes, forward and backward, and let go again. Its experts are one unit with
    it, never units of their own: which of them are called differs by rank.

    Args:
        model: Grown and frozen as it will be trained.
        mesh: One dimension, or two: copies, and ranks that share one.

    Raises:
        UserError: If the model has no layers that are known as such.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"Expected a language model whose decoder layers transformers names as such, got {type(model).__name__}: "
            "its weights cannot be sharded. Use `trainer.strategy: ddp`."
        )
    read = _parts(model)
    for module, name, part in read:  # what is sharded has shapes alone until it has its parts again
        shape = torch.empty(part.shape, dtype=part.dtype, device="meta")
        module._parameters[name] = nn.Parameter(shape, part.requires_grad)

    def place(parameter: nn.Parameter) -> Shard | None:
        dimension = even_dimension(mesh.size(-1), parameter)
        return None if dimension is None else Shard(dimension)

    alone = kept_whole(model)
    for unit in (*layers, model):
        # Also the last one is let go after its pass: between passes a parameter is always the rank's part.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, shard_placement_fn=place, ignored_params=alone)
    for module, name, part in read:
        del part.of_whole
        module._parameters[name] = part


def _parts(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Returns the parameters of which a rank has read its part, by module and name."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in module._parameters.items()
        if value is not None and of_whole(value) is not None
    ]


def even_dimension(ranks: int, parameter: Tensor) -> int | None:
    """Returns the first dimension that ranks share evenly: one new expert would else lie on one rank as a whole."""
    even = [number for number, size in enumerate(parameter.shape) if size % ranks == 0]
    return even[0] if even else None


def share_experts(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leaves each rank its part of the base's experts, in place, and lets tokens travel to them.

    Args:
        model: Grown and frozen as it will be trained.
        mesh: One dimension, or two: copies, and ranks that share one.

    Raises:
        UserError: If its experts learn, do not divide among ranks, or are called in a way of their own.
    """
    stacks = [getattr(block.experts, "root", block.experts) for block in find_blocks(model)]
    for experts in stacks:
        check_cut(experts, mesh.size(-1), type(model).__name__)
    for experts in stacks:
        cut(experts, mesh)
    for _, _, part in _parts(model):
        del part.of_whole
    exchange.use(model)
