"""Routing as pure functions, against plain Python loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moextend_pl.moe.extension.calibration import Calibration
from moextend_pl.moe.routing import (
    SMALLEST_SUM,
    Scoring,
    Selection,
    family_table,
    family_winners,
    join_gates,
    mask_groups,
    renormalise,
    seat_winners,
    select,
    weigh,
)

PLAIN = Scoring()
Routed = tuple[Tensor, Tensor]


def route_among_all(logits: Tensor, top_k: int, calibrate: nn.Module) -> Routed:
    scores, indices = select(logits, top_k, PLAIN)
    return weigh(calibrate(scores).gather(1, indices), PLAIN), indices


def route_within_families(logits: Tensor, top_k: int, calibrate: nn.Module, families: Tensor) -> Routed:
    winning, winners = family_winners(logits, families)
    scores, indices = select(winning, top_k, PLAIN)
    chosen = seat_winners(Selection(scores, scores, indices), winners, logits.shape[1])
    return weigh(calibrate(chosen.scores_TM).gather(1, chosen.indices_TK), PLAIN), chosen.indices_TK


QUICK = settings(max_examples=25, deadline=None)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def trained_calibration(experts: int, new: int) -> Calibration:
    module = Calibration(experts, new, seed=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.requires_grad_(False)


def loop_calibrate(module: nn.Module, probs: list[float]) -> list[float]:
    if not isinstance(module, Calibration):
        return probs
    rows = module.in_proj.tolist()
    hidden = [sum(w * p for w, p in zip(row, probs, strict=True)) for row in rows]
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
    out = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in module.out_proj.tolist()]
    return [p + o for p, o in zip(probs, out, strict=True)]


def loop_among_all(logits: list[float], top_k: int, calibrate: nn.Module) -> dict[int, float]:
    probs = softmax(logits)
    best = sorted(range(len(probs)), key=lambda e: -probs[e])[:top_k]
    gates = loop_calibrate(calibrate, probs)
    total = sum(gates[e] for e in best)
    return {e: gates[e] / total for e in best}


def loop_within_families(logits: list[float], top_k: int, calibrate: nn.Module, sources: list[int]) -> dict[int, float]:
    experts = len(logits) - len(sources)
    winners = []
    for expert in range(experts):
        members = [experts + n for n, source in enumerate(sources) if source == expert] + [expert]
        winners.append(max(members, key=lambda member: logits[member]))
    shares = softmax([logits[winner] for winner in winners])
    probs = [0.0] * len(logits)
    for winner, share in zip(winners, shares, strict=True):
        probs[winner] = share
    best = sorted(winners, key=lambda winner: -probs[winner])[:top_k]
    gates = loop_calibrate(calibrate, probs)
    total = sum(gates[e] for e in best)
    return {e: gates[e] / total for e in best}


def as_dicts(weights: Tensor, indices: Tensor) -> list[dict[int, float]]:
    pairs = zip(weights.tolist(), indices.tolist(), strict=True)
    return [dict(zip(index, weight, strict=True)) for weight, index in pairs]


SHAPES = st.tuples(st.integers(2, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10_000))


@QUICK
@given(shape=SHAPES, calibrated=st.booleans())
def test_routing_among_all_equals_a_loop(shape: tuple[int, int, int, int], calibrated: bool) -> None:
    experts, new, top_k, seed = shape
    top_k = min(top_k, experts)
    logits = torch.randn(7, experts + new, generator=torch.Generator().manual_seed(seed))
    calibrate = trained_calibration(experts, new) if calibrated else nn.Identity()
    got = as_dicts(*route_among_all(logits, top_k, calibrate))
    for row, gates in zip(logits.tolist(), got, strict=True):
        assert gates == pytest.approx(loop_among_all(row, top_k, calibrate), rel=1e-3, abs=1e-3)


@QUICK
@given(shape=SHAPES, calibrated=st.booleans(), data=st.data())
def test_routing_within_families_equals_a_loop(
    shape: tuple[int, int, int, int], calibrated: bool, data: st.DataObject
) -> None:
    experts, new, top_k, seed = shape
    top_k = min(top_k, experts)
    sources = data.draw(st.lists(st.integers(0, experts - 1), min_size=new, max_size=new))
    logits = torch.randn(7, experts + new, generator=torch.Generator().manual_seed(seed))
    calibrate = trained_calibration(experts, new) if calibrated else nn.Identity()
    got = as_dicts(*route_within_families(logits, top_k, calibrate, family_table(experts, sources)))
    for row, gates in zip(logits.tolist(), got, strict=True):
        assert gates == pytest.approx(loop_within_families(row, top_k, calibrate, sources), rel=1e-3, abs=1e-3)


def test_a_family_never_takes_two_slots() -> None:
    logits = torch.tensor([[5.0, 0.0, 1.0, 4.9]])
    _, among_all = route_among_all(logits, 2, nn.Identity())
    _, within = route_within_families(logits, 2, nn.Identity(), family_table(3, [0]))
    assert among_all.tolist() == [[0, 3]]
    assert within.tolist() == [[0, 2]]


def test_new_expert_wins_a_tie_with_its_source() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 2.0]])
    weights, indices = route_within_families(logits, 2, nn.Identity(), family_table(3, [0]))
    assert indices.tolist() == [[3, 1]]
    assert weights[0].tolist() == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)], abs=1e-6)


@pytest.mark.parametrize(
    ("experts", "sources", "expected"),
    [
        (3, [1], [[0, 0], [3, 1], [2, 2]]),
        (2, [0, 0], [[2, 3, 0], [1, 1, 1]]),
        (2, [1, 0], [[3, 0], [2, 1]]),
        (2, [], [[0], [1]]),
    ],
)
def test_family_table_lists_new_experts_before_their_source(
    experts: int, sources: list[int], expected: list[list[int]]
) -> None:
    assert family_table(experts, sources).tolist() == expected


def test_renormalised_gates_sum_to_one_also_with_negative_gates() -> None:
    gates = torch.tensor([[0.6, 0.2], [0.5, -0.2], [-0.5, -0.5]])
    got = renormalise(gates)
    assert got.sum(dim=-1).tolist() == pytest.approx([1.0] * 3)
    assert got[1].tolist() == pytest.approx([0.5 / 0.3, -0.2 / 0.3])


@pytest.mark.parametrize(
    "gates", [[0.5, -0.5], [0.0, 0.0], [-0.0, -0.0], [1e-8, 0.0], [-1e-8, 0.0], [0.25, -0.25 - 2e-8]], ids=str
)
def test_sum_near_zero_is_replaced_by_the_smallest_with_its_sign(gates: list[float]) -> None:
    value = torch.tensor([gates])
    total = float(value.sum())
    sign = math.copysign(1.0, float(value.sum()))
    got = renormalise(value)
    assert got.isfinite().all()
    assert abs(total) < SMALLEST_SUM
    assert got[0].tolist() == pytest.approx([gate / (sign * SMALLEST_SUM) for gate in value[0].tolist()])


def test_gradient_of_cancelling_gates_is_finite() -> None:
    gates = torch.tensor([[0.5, -0.5]], requires_grad=True)
    renormalise(gates).square().sum().backward()
    assert gates.grad.isfinite().all()


def test_half_precision_logits_are_routed_in_single_precision() -> None:
    weights, _ = route_among_all(torch.randn(3, 5).bfloat16(), 2, nn.Identity())
    assert weights.dtype == torch.float32


def test_fresh_calibration_changes_nothing() -> None:
    probs = torch.rand(5, 6).softmax(-1)
    assert torch.equal(Calibration(5, 1)(probs), probs)


def test_trained_calibration_equals_a_loop() -> None:
    module = trained_calibration(3, 2)
    probs = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for row, got in zip(probs.tolist(), module(probs).tolist(), strict=True):
        assert got == pytest.approx(loop_calibrate(module, row), abs=1e-6)


def test_calibration_sizes_follow_the_layer_and_its_seed_decides() -> None:
    module = Calibration(8, 1, seed=7)
    assert module.in_proj.shape == (16, 9)
    assert module.out_proj.shape == (9, 16)
    assert torch.equal(module.in_proj, Calibration(8, 1, seed=7).in_proj)
    assert not torch.equal(module.in_proj, Calibration(8, 1, seed=8).in_proj)


def test_multiplicative_calibration_scales_the_gates() -> None:
    module = trained_calibration(3, 2)
    module.form = "multiplicative"
    scores = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for row, got in zip(scores.tolist(), module(scores).tolist(), strict=True):
        corrections = [total - score for total, score in zip(loop_calibrate(module, row), row, strict=True)]
        assert got == pytest.approx([p * (1 + d) for p, d in zip(row, corrections, strict=True)], abs=1e-6)


def test_calibration_corrects_the_gates_that_an_earlier_one_left() -> None:
    module = trained_calibration(2, 1)
    scores, gates = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[0.1, 0.4, 0.5]])
    expected = module(scores) - scores + gates
    torch.testing.assert_close(module(scores, gates), expected)


@pytest.mark.parametrize(
    ("score", "fill", "expected"),
    [
        ("top2", "inf", [0.6, 0.5, -math.inf, -math.inf]),
        ("top2", "zero", [0.6, 0.5, 0.0, 0.0]),
        ("max", "zero", [0.0, 0.0, 0.9, 0.1]),
    ],
)
def test_selection_stays_in_the_best_groups(score: str, fill: str, expected: list[float]) -> None:
    scoring = Scoring(groups=2, top_groups=1, group_score=score, group_fill=fill)
    got = mask_groups(torch.tensor([[0.6, 0.5, 0.9, 0.1]]), scoring)
    assert got[0].tolist() == pytest.approx(expected)


def test_selection_bias_decides_who_is_selected_and_not_how_much() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 9.0])
    scores, indices = select(logits, 1, Scoring("sigmoid"), bias)
    assert indices.tolist() == [[2]]
    assert scores[0].tolist() == pytest.approx([1 / (1 + math.exp(-value)) for value in (2, 1, 0)])


def test_newcomers_leave_an_earlier_correction_its_share() -> None:
    earlier = Selection(torch.tensor([[0.6, 0.4]]), torch.tensor([[0.7, 0.3]]), torch.zeros(1, 1, dtype=torch.long))
    scores = torch.tensor([[0.3, 0.2, 0.5]])
    assert join_gates(scores, earlier)[0].tolist() == pytest.approx([0.35, 0.15, 0.5])
    plain = earlier._replace(gates_TM=earlier.scores_TM)
    assert join_gates(scores, plain) is scores


def test_scale_and_sum_follow_the_family() -> None:
    gates = torch.tensor([[0.2, 0.6]])
    assert weigh(gates, Scoring(normalised=False, scale=2.0))[0].tolist() == pytest.approx([0.4, 1.2])
    assert weigh(gates, Scoring(scale=2.0))[0].tolist() == pytest.approx([0.5, 1.5])
