"""Triton kernels that sort slots and route with new experts, run by Triton's interpreter on a CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.interpreted import answer, interpreted

pytest.importorskip("triton")

# Tokens, old and new experts, selected ones; how scores are corrected, families, normalised.
CASES = (
    (37, 4, 1, 2, "additive", True, True),
    (1, 8, 1, 2, "none", True, True),
    (33, 5, 2, 2, "multiplicative", True, False),
    (45, 30, 3, 4, "additive", False, True),
    (20, 4, 3, 2, "additive", True, True),
    (19, 70, 1, 8, "additive", True, False),
)


def routed(case: tuple[Any, ...]) -> dict[str, Any]:
    """Returns how far kernel and loop lie apart, with tied experts among the first tokens and some closed ones."""
    from helpers.plain_routing import plain_routing

    from moextend_pl.moe.kernels.calibrated_routing import calibrated_routing

    T, E, N, K, form, families, normalised = case
    torch.manual_seed(T)
    logits, sources, open_T = torch.randn(T, E + N), torch.randint(0, E, (N,)), torch.rand(T) < 0.7
    open_T[0] = True
    logits[: T // 2, E] = logits[: T // 2, sources[0]]  # a fresh copy
    base = torch.rand(T, K), torch.rand(T, E).topk(K).indices
    matrices = () if form == "none" else (torch.randn(2 * E, E + N) / 2, torch.randn(E + N, 2 * E) / 4)
    dweights, results = torch.randn(T, K), []
    for route, dtype in ((calibrated_routing, torch.float32), (plain_routing, torch.float64)):
        learning = [one.to(dtype).requires_grad_() for one in (logits, base[0], *matrices)]
        how = {"form": form, "families": families, "normalised": normalised, "scale": 1.0 if normalised else 2.5}
        calibration = tuple(learning[2:]) or None
        weights, indices = route(learning[0], open_T, (learning[1], base[1]), sources, calibration, **how)
        gradients = torch.autograd.grad(weights, learning, dweights.to(dtype), materialize_grads=True)
        results.append((indices, weights.detach(), *gradients))
    pairs = list(zip(*results, strict=True))[1:]
    closed = ~open_T
    return {
        "indices": torch.equal(results[0][0], results[1][0]),
        "closed": torch.equal(results[0][1][closed], base[0][closed]) and not results[0][2][closed].any(),
        "error": max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs),
    }


def guarded() -> dict[str, bool]:
    """Returns what comes of gates that cancel, of a token that is not finite, and of a gradient that does not come."""
    from helpers.silent import Silent

    from moextend_pl.moe.kernels.calibrated_routing import calibrated_routing

    how: dict[str, Any] = {"form": "additive", "families": False, "normalised": True, "scale": 1.0}
    logits = torch.zeros(3, 3)
    logits[1, 0] = float("nan")
    matrices = [torch.full((4, 3), 1e3).requires_grad_(), torch.full((3, 4), -1 / 12e3).requires_grad_()]
    base = torch.rand(3, 2, requires_grad=True), torch.tensor([[1, 0]] * 3)
    learning = [logits.requires_grad_(), base[0], *matrices]
    open_T = torch.tensor([True, True, False])
    weights, indices = calibrated_routing(learning[0], open_T, base, torch.tensor([0]), tuple(matrices), **how)
    none = torch.autograd.grad(Silent.apply(weights).sum(), learning, retain_graph=True)
    slopes = torch.autograd.grad(weights[::2].sum(), learning)
    return {
        "cancelling": bool(weights[0].isfinite().all()),
        "not finite": bool(weights[1].isnan().all()) and indices[1].tolist() == [0, 1],
        "closed": torch.equal(weights[2], base[0][2]) and bool((slopes[1] == torch.tensor([[0.0], [0], [1]])).all()),
        "unused": not none[0][0].any() and not none[1].any(),
    }


def not_finite() -> list[list[int]]:
    """Returns what tokens select that are not finite, of numbers of experts that fill a tile, or leave room in it."""
    from moextend_pl.moe.kernels.calibrated_routing import calibrated_routing

    how: dict[str, Any] = {"form": "none", "normalised": True, "scale": 1.0}
    selected = []
    for E, N in ((15, 1), (30, 2), (8, 1)):
        for families, wrong in itertools.product((True, False), (float("nan"), float("inf"))):
            logits, base = torch.randn(1, E + N), (torch.rand(1, 8), torch.arange(8)[None])
            logits[:, E:], logits[0, 3] = -9.0, wrong  # new experts lose against their sources
            sources = torch.arange(N)
            found = calibrated_routing(logits, torch.ones(1) > 0, base, sources, None, families=families, **how)
            selected.append(found[1][0].tolist())
    return selected


def once_extended_model() -> dict[str, Any]:
    """Returns how far an extended Mixtral lies from transformers' products, and how often a kernel selected."""
    from unittest.mock import patch

    from helpers.tiny_world import make_plan, perturb, tiny_mixtral

    from moextend_pl.moe import dispatch
    from moextend_pl.moe.extension.growth import grow, new_parameters
    from moextend_pl.moe.extension.reach import Reach
    from moextend_pl.moe.kernels import launch

    embeddings, results, started = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)), [], []
    for implementation in ("grouped_mm", dispatch.KERNEL_EXPERTS):
        model, reach = tiny_mixtral(num_hidden_layers=2).requires_grad_(False), Reach()
        dispatch.use(model, implementation)
        grow(model, make_plan([0, 1]), reach)
        reach.set(torch.tensor([True, False]))
        new = [parameter for parameters in new_parameters(model).values() for parameter in parameters]
        perturb(new, size=0.2)
        x = embeddings.clone().requires_grad_()
        with patch.object(launch, "choose", side_effect=launch.choose) as choose:
            logits = model(inputs_embeds=x, use_cache=False).logits
        started.append(choose.call_count)
        logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), x.grad, *(p.grad for p in new)])
    pairs = list(zip(*results, strict=True))
    return {"started": started, "compared": len(pairs), "error": max(float((a - b).abs().max()) for a, b in pairs)}


def ordered() -> list[bool]:
    """Returns whether slots stand in the order of torch's stable sort, and tiles cover each expert's."""
    from moextend_pl.moe.kernels.order import ROWS, order_slots

    right = []
    for T, K, M in ((300, 2, 5), (1, 1, 1), (0, 2, 4), (1100, 8, 300)):
        indices = torch.randint(0, M + 3, (T, K), generator=torch.Generator().manual_seed(T))
        order = order_slots(indices, M)
        flat = indices.flatten().clamp(max=M)
        slots = flat.sort(stable=True).indices
        ends = torch.bincount(flat, minlength=M + 1)[:M].cumsum(0)
        tiles = [(m, row) for m in range(M) for row in range(int(ends[m - 1]) if m else 0, int(ends[m]), ROWS)]
        listed = list(zip(order.expert_R.tolist(), order.row_R.tolist(), strict=True))
        right += [
            torch.equal(order.slot_S.long(), slots), torch.equal(order.end_M.long(), ends),
            torch.equal(order.slot_S[order.slots_TK.flatten().long()].long(), torch.arange(T * K)),
            listed[: len(tiles)] == tiles and all(m == M for m, _ in listed[len(tiles) :]),
        ]  # fmt: skip
    return right


def everything() -> dict[str, Any]:
    """Returns what each function above returns, by its name."""
    functions = (guarded, not_finite, once_extended_model, ordered)
    return {"routed": [routed(case) for case in CASES], **{one.__name__: one() for one in functions}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the interpreted functions return, all from one process."""
    return interpreted(__file__, "everything", tmp_path_factory.mktemp("routing"))


@pytest.mark.slow
def test_choice_weights_and_gradients_are_those_of_a_plain_loop(found: Any) -> None:
    for case, result in zip(CASES, found["routed"], strict=True):
        assert result["indices"], case
        assert result["closed"], case
        assert result["error"] < 1e-5, case


@pytest.mark.slow
def test_gates_that_cancel_and_tokens_that_are_not_finite_are_guarded(found: Any) -> None:
    assert found["guarded"] == {"cancelling": True, "not finite": True, "closed": True, "unused": True}


@pytest.mark.slow
def test_a_token_that_is_not_finite_selects_no_expert_twice(found: Any) -> None:
    assert len(found["not_finite"]) == 12
    for indices in found["not_finite"]:
        assert len(set(indices)) == 8, indices


@pytest.mark.slow
def test_an_extended_model_learns_as_by_the_operations_of_torch(found: Any) -> None:
    result = found["once_extended_model"]
    assert result["started"] == [0, 2]
    assert result["compared"] > 6
    assert result["error"] < 1e-5


@pytest.mark.slow
def test_slots_are_sorted_as_by_torch(found: Any) -> None:
    assert len(found["ordered"]) == 16
    assert all(found["ordered"])


@pytest.mark.parametrize(
    ("scoring", "experts", "suited"),
    [
        ({}, 9, True),
        ({"normalised": False, "scale": 2.5}, 256, True),
        ({}, 257, False),
        ({"score": "sigmoid"}, 9, False),
        ({"groups": 4}, 9, False),
    ],
)
def test_only_a_plain_softmax_of_some_experts_is_routed_by_a_kernel(
    scoring: dict[str, Any], experts: int, suited: bool
) -> None:
    from moextend_pl.moe.kernels.calibrated_routing import suits
    from moextend_pl.moe.routing import Scoring

    assert suits(Scoring(**scoring), experts) == suited


if __name__ == "__main__":
    answer(globals())
