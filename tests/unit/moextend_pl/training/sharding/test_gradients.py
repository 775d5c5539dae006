"""Gradients that are whole on each rank are averaged; norms and clipping are torch's, whoever holds which part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moextend_pl.training.sharding import gradients
from moextend_pl.training.sharding.gradients import clip_gradients, gradient_norm, share_gradients


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank, alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def drawn(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def cut(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """Returns a parameter as a strategy shards it."""
    sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
    assert parameter.grad is not None
    sharded.grad = distribute_tensor(parameter.grad.clone(), mesh, [Shard(0)])
    return sharded


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clipping_is_that_of_torch(mesh: DeviceMesh, by_value: bool, limit: float) -> None:
    plain = drawn((3, 4), (5,), (2, 3, 2))
    some = [cut(plain[0], mesh), nn.Parameter(torch.zeros(5)), cut(plain[2], mesh)]
    some[1].grad = plain[1].grad.clone()  # type: ignore[union-attr]
    assert gradient_norm([p.grad for p in some if p.grad is not None]) == pytest.approx(
        float(torch.nn.utils.get_total_norm([p.grad for p in plain if p.grad is not None]))
    )
    clip_gradients(some, limit, by_value)
    if by_value:
        torch.nn.utils.clip_grad_value_(plain, limit)
    else:
        torch.nn.utils.clip_grad_norm_(plain, limit)
    for one, other in zip(plain, some, strict=True):
        torch.testing.assert_close(other.grad.full_tensor() if other is not some[1] else other.grad, one.grad)  # type: ignore[union-attr]


def test_gradients_of_whole_parameters_become_the_mean_in_buckets_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = drawn((3, 4), (5,), (7,), (2,))
    parameters[2].data, parameters[2].grad = parameters[2].data.bfloat16(), torch.ones(7, dtype=torch.bfloat16)
    parameters[3].grad = None
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    sent: list[torch.Tensor] = []

    def reduce(flat: torch.Tensor) -> None:
        sent.append(flat.clone())
        flat *= 4  # as if three other ranks had found three times as much together

    monkeypatch.setattr(gradients.dist, "all_reduce", reduce)
    monkeypatch.setattr(gradients.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 48)
    before = [torch.zeros(2) if p.grad is None else p.grad.clone() for p in parameters]
    share_gradients([*parameters, frozen])
    assert [(len(flat), flat.dtype) for flat in sent] == [
        (12, torch.float32), (5, torch.float32), (7, torch.bfloat16), (2, torch.float32),
    ]  # fmt: skip
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 2)
    assert frozen.grad is None
