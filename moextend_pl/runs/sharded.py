"""Tensors of which each rank holds a part: files hold them whole, so that they are read under any strategy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tells whether ranks have to meet to see one of the tensors whole."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with all of its parts, detached; all ranks have to ask for the same one at the same time."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's part of a whole tensor that all ranks hold; the tensor itself where nothing is sharded.

    Args:
        value: Whole.
        like: Of the same shape; tells how ranks share it.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    # Every rank has read the same numbers: none has to send them.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def for_a_file(tensor: Tensor, writes: bool) -> Tensor:
    """Returns a tensor whole and on the CPU on the rank that writes it; others keep of it whether it is finite.

    So that all ranks come to the same verdict on what one of them writes, and only that one needs the memory.

    Args:
        tensor: Sharded or not.
        writes: Whether this rank writes.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = whole(tensor)
    if writes:
        return full.cpu()
    return torch.where(full.isfinite().all(), 0.0, math.nan).cpu()
