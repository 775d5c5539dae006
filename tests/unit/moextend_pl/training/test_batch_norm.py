"""Batch normalisation over ranks against torch's own; what two processes make of it is in tests/stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moextend_pl.training import batch_norm
from moextend_pl.training.batch_norm import GlobalBatchNorm2d


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (100.0, 0.1), (-1000.0, 1.0), (77.7, 0.0)])
def test_images_far_from_zero_are_normalised_as_torch_does(
    mean: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(value: Tensor) -> Tensor:
        return value

    monkeypatch.setattr(batch_norm, "all_reduce", alone)  # one rank
    monkeypatch.setattr(batch_norm.dist, "get_world_size", lambda: 1)
    drawn = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (GlobalBatchNorm2d(4), nn.BatchNorm2d(4)):
        x = (drawn * spread + mean).requires_grad_()
        y = layer.train()(x)
        (y * weights).sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad * spread, layer.running_var))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)
