"""How sure a score is: intervals by drawing units again, and whether two runs differ.

The units of a metric are drawn, not its answers: of MME pictures with both questions, of MMBench questions with all
rotations. Their sums are joined for each draw, and the metric makes the score of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics.keyed import KeyedMetric, Sums

DRAWS, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Interval:
    """A score and where it lies.

    Attributes:
        value: Over all units.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """The score of one run less that of another, over the same units.

    Attributes:
        p: How often runs that do not differ, and whose answers are swapped at random, differ as much; two-sided.
    """

    p: float


def _columns(units: Mapping[str, Sums]) -> tuple[list[str], np.ndarray]:
    names = sorted({name for sums in units.values() for name in sums})
    place = {name: n for n, name in enumerate(names)}
    table = np.zeros((len(units), len(names)))
    for row, sums in enumerate(units.values()):
        for name, value in sums.items():
            table[row, place[name]] = value
    return names, table


def _scores(metric: KeyedMetric, names: list[str], totals: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the scores of sums (draws, columns), by name."""
    columns = dict(zip(names, totals.T, strict=True))
    return {name: np.asarray(value, dtype=float) for name, value in metric.values(columns).items()}


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drawn(table: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Returns sums (draws, columns) over as many units as there are, drawn with replacement."""
    generator, count = np.random.default_rng(seed), len(table)
    found = np.empty((draws, table.shape[1]))
    for n in range(draws):  # one at a time: all at once would be draws x units numbers
        times = np.bincount(generator.integers(0, count, count), minlength=count)
        found[n] = times @ table
    return found


def bootstrap(
    metric: KeyedMetric, units: Mapping[str, Sums], draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """Returns each score with its percentile interval.

    Source: Efron and Tibshirani 1993, chapter 13.

    Args:
        metric: Whose units they are.
        units: Sums by unit, of `metric.units`.
        draws: How many sets are drawn.
        level: Share of them inside of the interval.
        seed: Of the draws.
    """
    names, table = _columns(units)
    values = _scores(metric, names, table.sum(axis=0, keepdims=True))
    drawn = _scores(metric, names, _drawn(table, draws, seed))
    return {name: Interval(float(value[0]), *_ends(drawn[name], level)) for name, value in values.items()}


def paired(
    metric: KeyedMetric, first: Mapping[str, Sums], second: Mapping[str, Sums], draws: int = DRAWS, seed: int = 0
) -> dict[str, Difference]:
    """Returns, for each score, the first run less the second, its interval and whether that may be chance.

    Args:
        metric: Whose units they are.
        first: Sums by unit of one run.
        second: Sums by unit of the other.
        draws: How many sets are drawn, and how many times answers are swapped.
        seed: Of both.

    Raises:
        UserError: If the runs were not asked the same.
    """
    other = set(first) ^ set(second)
    if other:
        raise UserError(
            f"Expected two runs that were asked the same questions, got {len(other)} that only one was asked, for "
            f"example {min(other)}. Evaluate both with the same task and `--limit`."
        )
    names = sorted({name for sums in (*first.values(), *second.values()) for name in sums})
    both = [_columns({key: dict.fromkeys(names, 0.0) | units[key] for key in first})[1] for units in (first, second)]
    drawn = [_scores(metric, names, _drawn(table, draws, seed)) for table in both]  # the same units in both
    whole = [_scores(metric, names, table.sum(axis=0, keepdims=True)) for table in both]
    swapped = _swapped(both[0], both[1], draws, seed)
    by_chance = [_scores(metric, names, totals) for totals in swapped]
    found = {}
    for name in whole[0]:
        value = float(whole[0][name][0] - whole[1][name][0])
        chance = np.abs(by_chance[0][name] - by_chance[1][name])
        p = (1 + int((chance >= abs(value) - 1e-12).sum())) / (draws + 1)
        found[name] = Difference(value, *_ends(drawn[0][name] - drawn[1][name], LEVEL), p)
    return found


def _swapped(first: np.ndarray, second: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sums of both runs (draws, columns) with the units of each draw swapped by the toss of a coin."""
    generator = np.random.default_rng(seed + 1)
    difference = second - first
    moved = np.stack([generator.integers(0, 2, len(first)) @ difference for _ in range(draws)])
    return first.sum(axis=0) + moved, second.sum(axis=0) - moved
