"""Gradients of a model of which a part is sharded and the rest is whole on each rank: shared, measured, clipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moextend_pl.runs.sharded import local

BUCKET_BYTES = 64 * 2**20


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the gradients of what each rank holds whole by their mean over ranks; FSDP2 shares the others itself.

    Args:
        parameters: Of the model. One that learns and got no gradient here gets zeros, as other ranks may have one.
    """
    if dist.get_world_size() == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, shared in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(shared.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts gradients into runs of one type, each about as large as is sent at a time."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(each.nbytes for each in bucket) + gradient.nbytes > BUCKET_BYTES
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, by_value: bool) -> None:
    """Clips gradients as `torch.nn.utils` does, of which each rank may hold a part only.

    Args:
        parameters: Of the optimizer.
        limit: Largest norm of all gradients together, or largest size of a number.
        by_value: Whether numbers are clipped, and not the norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    here = [part for part in map(local, gradients) if part.numel()]
    if by_value:
        for part in here:
            part.clamp_(-limit, limit)
        return
    scale = (limit / (gradient_norm(gradients) + 1e-6)).clamp(max=1.0)
    for part in here:
        part.mul_(scale.to(part.device))


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the norm of gradients taken together, a scalar in fp32 that is equal on all ranks.

    Args:
        gradients: Sharded ones count once, however many ranks hold a copy.
    """
    gradients = list(gradients)
    sharded = [each for each in gradients if isinstance(each, DTensor)]
    square = _square([each for each in gradients if not isinstance(each, DTensor)])
    if sharded:
        shared = _square([part for part in map(local, sharded) if part.numel()])
        mesh = sharded[0].device_mesh
        shared = shared.to(local(sharded[0]).device)
        dist.all_reduce(shared, group=mesh.get_group(mesh.ndim - 1))
        square = square.to(shared.device) + shared
    return square.sqrt()


def _square(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack([part.square() for part in torch._foreach_norm(tensors, 2.0, dtype=torch.float32)]).sum()
