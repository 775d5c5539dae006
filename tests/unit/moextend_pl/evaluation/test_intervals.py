"""Intervals and comparisons, against scipy and against what is known of a proportion."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.intervals import bootstrap, paired
from moextend_pl.evaluation.metrics import ExactMatch, KeyedMetric, MMEScore, POPEScore


def answered(rights: list[bool]) -> list[Any]:
    return [{"key": f"k{n}", "prediction": "a" if right else "b", "truth": "a"} for n, right in enumerate(rights)]


def drawn(seed: int, share: float, count: int = 400) -> list[bool]:
    draw = random.Random(seed)
    return [draw.random() < share for _ in range(count)]


def units(metric: KeyedMetric, rights: list[bool]) -> dict[str, dict[str, float]]:
    return metric.units(answered(rights))


def test_interval_of_a_share_is_that_of_scipy() -> None:
    rights, metric = drawn(0, 0.7), ExactMatch()
    found = bootstrap(metric, units(metric, rights), draws=2000)["exact_match"]
    values = np.array(rights, dtype=float)
    other = scipy_bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=1).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.01)
    again = bootstrap(metric, units(metric, rights), draws=2000)["exact_match"]
    assert again == found


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    metric = ExactMatch()
    inside = 0
    for seed in range(100):
        found = bootstrap(metric, units(metric, drawn(seed, 0.6, 200)), draws=100, seed=seed)["exact_match"]
        inside += found.low <= 0.6 <= found.high
    assert inside >= 88  # 95 expected; the chance of fewer is below one in a thousand


def test_pictures_of_mme_are_drawn_and_not_their_questions() -> None:
    rows: list[Any] = [
        {"key": f"{n}/{k}", "prediction": "yes" if n % 2 else "no",
         "truth": {"label": "yes", "subtask": "color", "image": str(n)}}
        for n in range(100) for k in range(2)
    ]  # fmt: skip
    found = bootstrap(MMEScore(), MMEScore().units(rows))["acc/color"]
    # Both answers about a picture are alike: as sure as 100 answers, not as 200.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 100 * math.sqrt(0.25 / 100), rel=0.15)


def test_pope_has_an_interval_of_every_score() -> None:
    rows: list[Any] = [
        {"key": f"{c}{n}", "prediction": "yes" if n % 3 else "no",
         "truth": {"label": "yes" if n % 2 else "no", "category": c}}
        for c in ("random", "popular") for n in range(60)
    ]  # fmt: skip
    metric = POPEScore()
    found = bootstrap(metric, metric.units(rows), draws=100)
    assert set(found) == set(metric.score(rows))
    assert all(each.low <= each.value <= each.high for each in found.values())
    assert {name: each.value for name, each in found.items()} == pytest.approx(metric.score(rows))


def test_two_runs_are_compared_answer_by_answer() -> None:
    metric, first = ExactMatch(), drawn(1, 0.6)
    # Another run that differs in 30 answers, 21 of which it has wrong.
    second = list(first)
    yes = [n for n, right in enumerate(first) if right][:21]
    no = [n for n, right in enumerate(first) if not right][:9]
    for n in yes + no:
        second[n] = not second[n]
    found = paired(metric, units(metric, first), units(metric, second), draws=4000)["exact_match"]
    assert found.value == pytest.approx(12 / 400)
    assert 0 < found.low < found.value < found.high
    assert found.p == pytest.approx(binomtest(21, 30).pvalue, abs=0.01)  # McNemar's exact test


def test_equal_runs_do_not_differ() -> None:
    metric, rights = ExactMatch(), drawn(2, 0.5)
    found = paired(metric, units(metric, rights), units(metric, rights), draws=50)["exact_match"]
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_runs_with_other_questions_are_refused() -> None:
    metric = ExactMatch()
    with pytest.raises(UserError, match=r"got 1 that only one was asked, for example k3"):
        paired(metric, units(metric, [True] * 4), units(metric, [True] * 3))
