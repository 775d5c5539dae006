"""Leaves each rank its experts of a frozen base, and finds them again.

Shapes: E experts in all, N ranks, L = E / N experts of a rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moextend_pl.contracts import UserError
from moextend_pl.moe.blocks import expert_count

_USE = "Use `trainer.strategy: fsdp2`"


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
    """Leaves each rank its L experts of a module, in place.

    Args:
        experts: Frozen experts module of a base, for which `check_cut` holds.
        mesh: One dimension, or two: copies, and ranks that share one.
    """
    count, ranks, rank = expert_count(experts), mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
    rows = slice(rank * count // ranks, (rank + 1) * count // ranks)
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for name, value in list(experts._parameters.items()):
        if value is not None and value.dim() and len(value) == count:
            # A copy, so that the whole can go.
            part = DTensor.from_local(value.detach()[rows].clone(), mesh, placements, run_check=False)
            experts._parameters[name] = nn.Parameter(part, requires_grad=False)
