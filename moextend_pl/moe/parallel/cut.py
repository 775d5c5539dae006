"""Leaves each rank its experts of a frozen base, and finds them again.

Shapes: E experts in all, N ranks, L = E / N experts of a rank.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moextend_pl.contracts import UserError
from moextend_pl.moe.blocks import expert_count

_USE = "Use `trainer.strategy: fsdp2`"


@dataclass(frozen=True)
class OfWhole:
    """What is still asked of a whole tensor while a model is built, where a rank has read a part of it.

    Attributes:
        rows: Entries of its first dimension, by their place.
        sha256: Of its type, shape and bytes; empty if nobody asks.
    """

    rows: dict[int, Tensor]
    sha256: str


def of_whole(value: Tensor) -> OfWhole | None:
    """Returns what is known of the whole of a tensor; None if it is whole, or nothing is asked of it any more."""
    found: OfWhole | None = getattr(value, "of_whole", None)
    return found


def copied_rows(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns copies of entries of a tensor's first dimension, of which this rank may hold a part."""
    known = of_whole(value)
    return value.detach()[list(rows)].clone() if known is None else torch.stack([known.rows[row] for row in rows])


def own_slice(value: Tensor, mesh: DeviceMesh, dimension: int) -> Tensor:
    """Returns this rank's slice of a whole tensor, as a view.

    Args:
        value: Whole; ranks share the dimension evenly.
        mesh: One dimension, or two: copies, and ranks that share one.
        dimension: Which one they share.
    """
    size = value.shape[dimension] // mesh.size(-1)
    return value.narrow(dimension, mesh.get_local_rank(mesh.ndim - 1) * size, size)


def part_of(value: Tensor, mesh: DeviceMesh, dimension: int) -> nn.Parameter:
    """Returns this rank's part of a whole tensor, a copy, so that the whole can go; arguments as in `own_slice`."""
    mine = own_slice(value.detach(), mesh, dimension).clone(memory_format=torch.contiguous_format)
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(dimension)]
    return nn.Parameter(DTensor.from_local(mine, mesh, placements, run_check=False), value.requires_grad)


def take_values(parameter: Tensor, value: Tensor) -> None:
    """Gives a parameter, of which this rank may hold a part, the values of a whole tensor."""
    known = of_whole(parameter)
    if known is None or not isinstance(parameter, DTensor):
        parameter.detach().copy_(value)
        return
    (shared,) = (place.dim for place in parameter.placements if isinstance(place, Shard))
    parameter.to_local().detach().copy_(own_slice(value, parameter.device_mesh, shared))
    for row, copied in known.rows.items():
        copied.copy_(value[row])


def is_cut(experts: nn.Module) -> bool:
    """Returns whether each rank holds a part of the experts of a module only."""
    return any(isinstance(parameter, DTensor) for parameter in experts._parameters.values())


def ranks_of(experts: nn.Module) -> dist.ProcessGroup:
    """Returns the ranks that share the experts of a module that is cut."""
    held: Any = list(experts._parameters.values())
    mesh: DeviceMesh = next(value.device_mesh for value in held if isinstance(value, DTensor))
    return mesh.get_group(mesh.ndim - 1)


def own_experts(experts: nn.Module) -> Any:
    """Returns a module of the L experts of this rank, which computes as the whole one would; index L is skipped.

    Args:
        experts: A module that is cut. The weights stay its own.
    """
    mine: Any = copy.copy(experts)
    mine._parameters = {
        name: nn.Parameter(value.to_local(), requires_grad=False) if isinstance(value, DTensor) else value
        for name, value in experts._parameters.items()
    }
    mine.num_experts = expert_count(experts) // dist.get_world_size(ranks_of(experts))
    mine._is_expert_parallel = True
    return mine


def check_cut(experts: Any, ranks: int, name: str) -> None:
    """Refuses experts that cannot be shared.

    Args:
        experts: Experts module of a base.
        ranks: N.
        name: Of the model, for the sentence.

    Raises:
        UserError: If it is so.
    """
    count = expert_count(experts)
    if count % ranks:
        raise UserError(
            f"Expected processes among which the {count} experts of a layer of {name} divide, got {ranks}. Change "
            "`trainer.devices`, or `copies` of ShardedStrategy, or take `trainer.strategy: fsdp2`."
        )
    if not hasattr(experts, "has_gate"):
        raise UserError(
            f"The experts of {name} are called by code of their own, which looks for all of them on each process. "
            f"{_USE}."
        )
    if any(parameter.requires_grad for parameter in experts.parameters()):
        raise UserError(f"Experts of the base that learn are not shared by `expert_parallel`. {_USE}, or freeze them.")


def cut(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank its L experts of a module, in place; does nothing where it has read no others.

    Args:
        experts: Frozen experts module of a base, for which `check_cut` holds.
        mesh: One dimension, or two: copies, and ranks that share one.
    """
    count = expert_count(experts)
    for name, value in list(experts._parameters.items()):
        if value is not None and value.dim() and len(value) == count and not isinstance(value, DTensor):
            experts._parameters[name] = part_of(value, mesh, 0)
