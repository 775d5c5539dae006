"""Layer rules: one battery for all of them, and a hand-computed example for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from moextend_pl.contracts import UserError
from moextend_pl.moe import selection
from moextend_pl.moe.selection import (
    LayerRule,
    divergence_score,
    random_experts,
    shift_score,
    source_experts,
    strongest,
)

# Shift by layer: 1 most, then 5, 3, 2, and none in 0 (changes of shares by 0.4, 0.3, 0.2, 0.1, 0).
BEFORE = {layer: torch.tensor([50, 50]) for layer in (0, 1, 2, 3, 5)}
AFTER = {0: [50, 50], 1: [90, 10], 2: [60, 40], 3: [30, 70], 5: [80, 20]}
AFTER = {layer: torch.tensor(counts) for layer, counts in AFTER.items()}

ARGUMENTS = {"ExplicitLayers": {"layers": [3, 0, 3]}, "BudgetRule": {"parameters": 2500, "parameters_per_layer": 1000}}
BY_HAND = {
    "ShiftRule": [1, 5],
    "DivergenceRule": [1, 5],
    "AllLayers": [0, 1, 2, 3, 5],
    "FirstLayers": [0, 1],
    "LastLayers": [3, 5],
    "LeastShiftRule": [0, 2],
    "IntervalLayers": [0, 2, 5],
    "ExplicitLayers": [0, 3],
    "BudgetRule": [1, 5],
}


def subclasses(cls: type) -> list[type]:
    found = [sub for child in cls.__subclasses__() for sub in [child, *subclasses(child)]]
    return [sub for sub in found if sub.__module__ == selection.__name__]


RULES = sorted({cls for cls in subclasses(LayerRule) if not cls.__name__.startswith("_")}, key=lambda cls: cls.__name__)


def make(cls: type) -> LayerRule:
    return cls(**ARGUMENTS.get(cls.__name__, {}))


def test_discovery_finds_the_rules_of_the_design() -> None:
    assert len(RULES) >= 8
    assert set(BY_HAND) <= {cls.__name__ for cls in RULES}


@pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
class TestEveryRule:
    def test_chooses_a_sorted_non_empty_subset_of_the_layers(self, cls: type) -> None:
        chosen = make(cls).choose(BEFORE, AFTER)
        assert chosen == sorted(set(chosen))
        assert 0 < len(chosen) <= len(BEFORE)
        assert set(chosen) <= set(BEFORE)

    def test_is_deterministic(self, cls: type) -> None:
        rule = make(cls)
        assert rule.choose(BEFORE, AFTER) == rule.choose(BEFORE, AFTER) == make(cls).choose(BEFORE, AFTER)

    def test_does_not_depend_on_the_order_of_the_layers(self, cls: type) -> None:
        turned = [dict(reversed(usage.items())) for usage in (BEFORE, AFTER)]
        assert make(cls).choose(*turned) == make(cls).choose(BEFORE, AFTER)

    def test_scores_every_layer(self, cls: type) -> None:
        scores = make(cls).scores(BEFORE, AFTER)
        assert set(scores) == set(BEFORE)
        assert scores[0] == pytest.approx(0.0, abs=1e-12)
        assert max(scores, key=scores.get) == 1

    def test_leaves_the_counts_alone(self, cls: type) -> None:
        make(cls).choose(BEFORE, AFTER)
        assert BEFORE[1].tolist() == [50, 50]
        assert AFTER[1].tolist() == [90, 10]


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_rule_agrees_with_hand_computation(name: str) -> None:
    assert make(getattr(selection, name)).choose(BEFORE, AFTER) == BY_HAND[name]


COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=8)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), before=COUNTS)
def test_shift_score_is_the_sample_deviation_of_changed_shares(data: st.DataObject, before: list[int]) -> None:
    after = data.draw(st.lists(st.integers(0, 1000), min_size=len(before), max_size=len(before)))
    a, b = np.array(before) / max(sum(before), 1), np.array(after) / max(sum(after), 1)
    got = shift_score(torch.tensor(before), torch.tensor(after))
    assert got == pytest.approx(np.std(a - b, ddof=1), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), before=COUNTS)
def test_divergence_score_is_scipys_entropy_with_one_added(data: st.DataObject, before: list[int]) -> None:
    after = data.draw(st.lists(st.integers(0, 1000), min_size=len(before), max_size=len(before)))
    expected = entropy(np.array(after) + 1, np.array(before) + 1)
    assert divergence_score(torch.tensor(before), torch.tensor(after)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, [1, 5]), (0.25, [5]), (1.0, [0, 1, 2, 5]), (0.74, [1, 5])])
def test_strongest_takes_the_floor_of_the_fraction(fraction: float, expected: list[int]) -> None:
    assert strongest({0: 0.1, 1: 0.3, 2: 0.2, 5: 0.4}, fraction) == expected


def test_tie_goes_to_the_lower_layer() -> None:
    assert strongest({3: 1.0, 1: 1.0, 2: 1.0, 0: 0.0}, 0.5) == [1, 2]


@pytest.mark.parametrize(("count", "layers"), [(1, 40), (40, 40), (15, 22), (13, 23), (31, 39), (50, 40)])
def test_budget_is_used_in_full(count: int, layers: int) -> None:
    before = {layer: torch.tensor([1, 1]) for layer in range(layers)}
    after = {layer: torch.tensor([1, 2 + layer]) for layer in range(layers)}
    chosen = selection.BudgetRule(count * 10 + 9, 10).choose(before, after)
    assert chosen == list(range(layers))[-count:]


def test_random_layers_depend_on_the_seed() -> None:
    usage = {layer: torch.tensor([1, 1]) for layer in range(12)}
    draws = {tuple(selection.RandomRule(0.5, seed).choose(usage, usage)) for seed in range(5)}
    assert len(draws) > 1
    assert {len(draw) for draw in draws} == {6}


def test_sources_are_the_most_used_with_ties_to_the_lower_index() -> None:
    usage = torch.tensor([4, 9, 4, 9, 1])
    assert source_experts(usage) == (1,)
    assert source_experts(usage, 3) == (1, 3, 0)
    with pytest.raises(UserError, match="at most 5 new experts"):
        source_experts(usage, 6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: selection.ShiftRule(0.0), r"`fraction` in \(0, 1\], got 0.0"),
        (lambda: selection.ShiftRule(1.1), r"`fraction` in \(0, 1\], got 1.1"),
        (lambda: selection.ShiftRule(0.1).choose(BEFORE, AFTER), "at least one of 5 layers, got 0.1"),
        (lambda: selection.ExplicitLayers([4]).choose(BEFORE, AFTER), r"among \[0, 1, 2, 3, 5\], got \[4\]"),
        (lambda: selection.ExplicitLayers([]).choose(BEFORE, AFTER), r"got \[\]"),
        (lambda: selection.IntervalLayers(0), "`step` >= 1, got 0"),
        (lambda: selection.BudgetRule(9, 10), "at least one layer's 10 new parameters, got 9"),
    ],
)
def test_impossible_settings_are_refused(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_random_experts_are_distinct_and_drawn_anew_for_each_layer_and_seed() -> None:
    drawn = [random_experts(8, 2, seed, layer) for seed in range(20) for layer in range(10)]
    assert drawn == [random_experts(8, 2, seed, layer) for seed in range(20) for layer in range(10)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert counts.min() > 25  # 50 each, by chance
    assert len({tuple(drawn[n : n + 10]) for n in range(0, 200, 10)}) == 20
    with pytest.raises(UserError, match="at most 3 new experts"):
        random_experts(3, 4, 0, 0)
