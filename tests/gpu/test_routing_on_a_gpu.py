"""The kernels that sort slots and route with new experts, and norms of liger-kernel, on a real CUDA device."""

from __future__ import annotations

import pytest
import torch
from helpers.plain_routing import plain_routing

from moextend_pl.moe.kernels.calibrated_routing import calibrated_routing
from moextend_pl.moe.kernels.norms import LigerNorm, plain_norm
from moextend_pl.moe.kernels.order import order_slots


@pytest.mark.parametrize(("tokens", "old", "top_k", "families"), [(200, 8, 2, True), (77, 128, 8, False)])
def test_routing_is_that_of_a_plain_loop(tokens: int, old: int, top_k: int, families: bool) -> None:
    torch.manual_seed(tokens)
    logits, sources = torch.randn(tokens, old + 1), torch.tensor([1])
    open_T, base = torch.rand(tokens) < 0.7, (torch.rand(tokens, top_k), torch.rand(tokens, old).topk(top_k).indices)
    matrices = torch.randn(2 * old, old + 1) / 2, torch.randn(old + 1, 2 * old) / 4
    results = []
    for route, device, dtype in ((calibrated_routing, "cuda", torch.float32), (plain_routing, "cpu", torch.float64)):
        learning = [one.to(device, dtype).requires_grad_() for one in (logits, base[0], *matrices)]
        weights, indices = route(
            learning[0], open_T.to(device), (learning[1], base[1].to(device)), sources.to(device),
            (learning[2], learning[3]), form="additive", families=families, normalised=True, scale=1.0,
        )  # fmt: skip
        gradients = torch.autograd.grad(weights.sin().sum(), learning)
        results.append([indices.cpu(), *(one.detach().double().cpu() for one in (weights, *gradients))])
    assert torch.equal(results[0][0], results[1][0])
    for got, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_slots_are_sorted_as_by_torch() -> None:
    indices = torch.randint(0, 70, (8192, 8), device="cuda")
    order = order_slots(indices, 65)
    flat = indices.flatten().clamp(max=65)
    assert torch.equal(order.slot_S.long(), flat.sort(stable=True).indices)
    assert torch.equal(order.end_M.long(), torch.bincount(flat, minlength=66)[:65].cumsum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_the_package_are_those_of_transformers(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    x, weight, dy = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((3, 50, 96), (96,), (3, 50, 96)))
    norm, x = LigerNorm(torch.nn.Parameter(weight), 1e-5), x.requires_grad_()
    got = norm(x)
    expected = plain_norm(x, norm.weight, 1e-5)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(y, (x, norm.weight), dy) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
