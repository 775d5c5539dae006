"""Triton kernels of gated experts, run by Triton's interpreter on a CPU and held to a plain loop in 64 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.interpreted import answer, interpreted
from torch import Tensor

pytest.importorskip("triton")

ROUTES = ("any", "one expert", "some for nobody")


def routed(tokens: int, experts: int, top_k: int, route: str) -> Tensor:
    """Indices of distinct experts; the last but one expert gets no token where there are enough others."""
    choices = (
        [*range(experts - 2), experts - 1][-max(top_k, experts - 1) :] if experts > top_k + 1 else [*range(experts)]
    )
    pool = torch.tensor([*choices, *([experts] if route == "some for nobody" else [])])
    indices = pool[torch.rand(tokens, len(pool)).topk(top_k).indices]
    if route == "one expert":
        indices[:, 0] = experts - 1
        indices[:, 1:] = torch.arange(top_k - 1)
    return indices


def both(case: dict[str, Any]) -> list[list[Tensor]]:
    """Returns output and gradients by the kernels in 32 bits and by the loop in 64."""
    from helpers.plain_experts import plain_loop

    from moextend_pl.moe.kernels.gated_experts import gated_experts

    torch.manual_seed(case["tokens"])
    T, D, I, E, N, K = (case[name] for name in ("tokens", "width", "inner", "frozen", "new", "top_k"))  # noqa: E741
    x, weights, dy = (torch.randn(T, n, dtype=torch.float64) for n in (D, K, D))
    indices = routed(T, E + N, K, case["route"])
    stacks = [[0.2 * torch.randn(n, *shape, dtype=torch.float64) for shape in ((2 * I, D), (D, I))] for n in (E, N)]
    results = []
    for compute, dtype in ((gated_experts, torch.float32), (plain_loop, torch.float64)):
        learning = [t.to(dtype).requires_grad_() for t in (x, weights, *stacks[1])]
        frozen = tuple(t.to(dtype) for t in stacks[0])
        y = compute(learning[0], indices, learning[1], frozen, tuple(learning[2:]))
        learning = learning if N else learning[:2]
        results.append([y.detach(), *torch.autograd.grad(y, learning, dy.to(dtype))])
    return results


CASES = [
    {"tokens": tokens, "width": width, "inner": inner, "frozen": frozen, "new": new, "top_k": top_k, "route": route}
    for tokens, width, inner, frozen, new, top_k in (
        (37, 64, 48, 5, 2, 2),
        (1, 16, 24, 3, 0, 2),
        (300, 80, 70, 3, 1, 2),  # no multiples of a tile
        (150, 128, 128, 4, 2, 3),  # multiples of it
    )
    for route in ROUTES
]


def worst_errors() -> list[list[float]]:
    """Returns for each case the largest error of output and gradients, against the largest true number."""
    pairs = [zip(*both(case), strict=True) for case in CASES]
    return [[float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pair] for pair in pairs]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the interpreted functions return, all from one process."""
    return interpreted(__file__, "everything", tmp_path_factory.mktemp("kernels"))


def everything() -> dict[str, Any]:
    """Returns what each function below returns, by its name."""
    return {one.__name__: one() for one in (worst_errors, corners, alone_and_extended, twice_extended_model)}


@pytest.mark.slow
def test_output_and_gradients_are_those_of_a_plain_loop(found: Any) -> None:
    for case, errors in zip(CASES, found["worst_errors"], strict=True):
        assert max(errors) < 1e-5, (case, errors)


def alone_and_extended() -> dict[str, bool]:
    """Returns whether a token's result is the same bits beside other tokens, and with and without new experts."""
    from moextend_pl.moe.kernels.gated_experts import gated_experts

    torch.manual_seed(0)
    T, D, I, E, K = 200, 64, 48, 4, 2  # noqa: E741
    x, weights = torch.randn(T, D), torch.rand(T, K)
    indices = torch.rand(T, E).topk(K).indices
    frozen = torch.randn(E, 2 * I, D), torch.randn(E, D, I)
    none, new = tuple(w[:0] for w in frozen), tuple(w[:1] * 2 for w in frozen)
    mixed = indices.clone()
    mixed[100:, 1] = E  # half of the tokens choose the new expert
    y = gated_experts(x, indices, weights, frozen, none)
    return {
        "beside others": torch.equal(y[50:60], gated_experts(x[50:60], indices[50:60], weights[50:60], frozen, none)),
        "extended": torch.equal(y[:100], gated_experts(x, mixed, weights, frozen, new)[:100]),
        "changes": not torch.equal(y[100:], gated_experts(x, mixed, weights, frozen, new)[100:]),
    }


def corners() -> dict[str, bool]:
    """Returns whether no token at all, and an index that names nobody and does not fit 16 bits, are taken."""
    from moextend_pl.moe.kernels.gated_experts import gated_experts

    torch.manual_seed(0)
    stacks = torch.randn(3, 8, 16), torch.randn(3, 16, 4)
    new = tuple(stack[:1].clone().requires_grad_() for stack in stacks)
    none = gated_experts(torch.randn(0, 16), torch.empty(0, 2, dtype=torch.long), torch.rand(0, 2), stacks, new)
    none.sum().backward()
    x, weights, indices = torch.randn(5, 16), torch.rand(5, 2), torch.tensor([[0, 2]] * 5)
    expected = gated_experts(x, torch.where(indices == 2, 4, indices), weights, stacks, new)
    far = gated_experts(x, torch.where(indices == 2, 40_000, indices), weights, stacks, new)
    return {
        "no token": none.shape == (0, 16) and not any(one.grad.any() for one in new),
        "nobody": torch.equal(far, expected) and bool(far.any()),
        "tokens": tokens_matter_only_where_something_learns(),
        "no gradient": nothing_comes_back(),
    }


def nothing_comes_back() -> bool:
    """Returns whether gradients are zeros where what comes after hands none back, as other ranks wait for them."""
    from helpers.silent import Silent

    from moextend_pl.moe.kernels.gated_experts import gated_experts

    stacks = [torch.randn(1, *shape) for shape in ((8, 16), (16, 4))]
    learning = [torch.randn(5, 16), torch.rand(5, 1), *(2 * one for one in stacks)]
    x, weights, *new = (one.requires_grad_() for one in learning)
    y = gated_experts(x, torch.tensor([[0], [1]] * 2 + [[0]]), weights, tuple(stacks), tuple(new))
    (Silent.apply(y) * 1.0).sum().backward()
    return all(one.grad is not None and not one.grad.any() for one in learning)


def tokens_matter_only_where_something_learns() -> bool:
    """Returns whether tokens are kept for new experts that learn alone, and get a gradient only if they ask for one."""
    from moextend_pl.moe.kernels.gated_experts import gated_experts

    T, D, E = 9, 16, 3
    indices, dy, right = torch.rand(T, E + 1).topk(2).indices, torch.randn(T, D), []
    stacks = [torch.randn(n, *shape) for n in (E, 1) for shape in ((8, D), (D, 4))]
    every: list[Any] = []
    for x_learns, new_learns in ((True, True), (True, False), (False, True), (False, False)):
        x, weights = torch.randn(T, D, generator=torch.Generator().manual_seed(1)), torch.full((T, 2), 0.5)
        new, kept = tuple(one.clone().requires_grad_(new_learns) for one in stacks[2:]), []
        x.requires_grad_(x_learns)
        weights.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            y = gated_experts(x, indices, weights, tuple(stacks[:2]), new)
        y.backward(dy)
        every.append((x.grad, weights.grad, new[0].grad, new[1].grad))
        right.append((x.data_ptr() in kept) == new_learns)
        asked = (x_learns, True, new_learns, new_learns)
        right += [(one is not None) == ask for one, ask in zip(every[-1], asked, strict=True)]
        right += [torch.equal(one, all_) for one, all_ in zip(every[-1], every[0], strict=True) if one is not None]
    return all(right)


@pytest.mark.slow
def test_no_token_and_an_index_of_nobody_are_taken(found: Any) -> None:
    assert found["corners"] == {
        "no token": True, "nobody": True, "tokens": True, "no gradient": True
    }  # fmt: skip


def test_a_view_in_another_order_is_left_to_others() -> None:
    from helpers.tiny_world import tiny_mixtral

    from moextend_pl.moe.blocks import find_blocks
    from moextend_pl.moe.kernels.gated_experts import fits

    experts = find_blocks(tiny_mixtral())[0].experts
    assert fits(experts)
    turned = experts.down_proj.detach().transpose(1, 2).contiguous().transpose(1, 2)
    experts.down_proj = torch.nn.Parameter(turned)
    assert not fits(experts)


@pytest.mark.slow
def test_a_token_has_the_same_bits_beside_others_and_beside_new_experts(found: Any) -> None:
    assert found["alone_and_extended"] == {"beside others": True, "extended": True, "changes": True}


def twice_extended_model() -> dict[str, float]:
    """Returns how far gradients and logits of a twice extended Mixtral lie from those of transformers' products."""
    from helpers.tiny_world import make_plan, perturb, tiny_mixtral

    from moextend_pl.moe import dispatch
    from moextend_pl.moe.extension.growth import grow, new_parameters
    from moextend_pl.moe.extension.reach import Reach

    embeddings, results = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)), []
    for implementation in ("grouped_mm", dispatch.KERNEL_EXPERTS):
        model, reaches = tiny_mixtral(num_hidden_layers=2).requires_grad_(False), (Reach(), Reach())
        dispatch.use(model, implementation)
        for reach in reaches:
            grow(model, make_plan([1]), reach)
            reach.set(torch.tensor([True, reach is reaches[1]]))
        new = [parameter for parameters in new_parameters(model).values() for parameter in parameters]
        perturb(new, size=0.2)
        x = embeddings.clone().requires_grad_()
        logits = model(inputs_embeds=x, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), x.grad, *(p.grad for p in new if p.grad is not None)])
    pairs = list(zip(*results, strict=True))
    return {"compared": len(pairs), "error": max(float((a - b).abs().max()) for a, b in pairs)}


@pytest.mark.slow
def test_a_twice_extended_model_learns_as_by_the_products_of_transformers(found: Any) -> None:
    result = found["twice_extended_model"]
    assert result["compared"] > 6
    assert result["error"] < 1e-5


if __name__ == "__main__":
    answer(globals())
