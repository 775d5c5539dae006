"""Numbers that are none, NaN and infinity, are found in tensors and refused before a file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moextend_pl.contracts import UserError
from moextend_pl.runs.sharded import any_sharded, local


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that hold NaN or infinity; where ranks share them, on all ranks alike.

    Args:
        tensors: By name, on any devices; each device is waited for once. Packed ones count as finite.
    """
    found: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        here = local(tensor.detach())
        if here.is_floating_point() and here.dtype.itemsize > 1 and here.numel() and here.device.type != "meta":
            # One pass and no copy; NaN comes through.
            found.setdefault(here.device, {})[name] = torch.stack(torch.aminmax(here)).isfinite().all()
    fine: dict[str, bool] = {}
    for flags in found.values():
        fine.update(zip(flags, torch.stack(list(flags.values())).tolist(), strict=True))
    wrong = [name for name in tensors if not fine.get(name, True)]
    if any_sharded(tensors.values()):
        by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, wrong)
        wrong = [name for name in tensors if any(name in each for each in by_rank)]
    return wrong


def check_finite(tensors: Mapping[str, Tensor], place: str, advice: str) -> None:
    """Refuses NaN and infinity.

    Args:
        tensors: By name.
        place: What holds them, for the sentence.
        advice: What to do.

    Raises:
        UserError: If there is one.
    """
    if wrong := non_finite(tensors):
        raise UserError(
            f"Expected finite numbers in {place}, got NaN or infinity in {len(wrong)} of {len(tensors)} tensors, for "
            f"example {wrong[0]}. {advice}"
        )


def checkpoint_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of the model and of the optimizers in a checkpoint of Lightning, by names for a sentence."""
    moments = {
        f"{name} of the optimizer's parameter {number}": value
        for state in checkpoint.get("optimizer_states", ())
        for number, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return {**checkpoint["state_dict"], **moments}
