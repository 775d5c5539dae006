"""Is one level of a factor better than another? Differences within each seed, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import nct, ttest_1samp
from scipy.stats import t as student

ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Effect:
    """The mean of paired differences.

    Attributes:
        seeds: How many differences.
        mean: Their mean.
        spread: Their standard deviation (ddof 1).
        low: Lower end of the 95 % interval of the mean (Student's t).
        high: Upper end.
        p: How often differences of a true mean of 0 lie as far from it; two-sided.
    """

    seeds: int
    mean: float
    spread: float
    low: float
    high: float
    p: float


def paired_effect(differences: Sequence[float]) -> Effect:
    """Returns what paired differences say of their true mean.

    Args:
        differences: One a seed, two or more.
    """
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:  # Student's t is not defined: nothing is left to chance
        return Effect(len(differences), mean, 0.0, mean, mean, float(mean == 0))
    test = ttest_1samp(differences, 0.0)
    ends = test.confidence_interval(1 - ALPHA)
    return Effect(len(differences), mean, spread, float(ends.low), float(ends.high), float(test.pvalue))


def smallest_effect(spread: float, seeds: int, claims: int = 1) -> float:
    """Returns the true mean that a two-sided t test at 5 % finds with probability 0.8.

    Args:
        spread: Standard deviation of the paired differences.
        seeds: How many there are, two or more.
        claims: Claims that are tried at once; the level of each is 5 % divided by them (Bonferroni).
    """
    if spread == 0:
        return 0.0
    free = seeds - 1
    edge = float(student.ppf(1 - ALPHA / claims / 2, free))

    def lacking(shift: float) -> float:  # found, and with its own sign
        return float(nct.sf(edge, free, shift)) - POWER

    return float(brentq(lacking, 0.0, 3 * edge)) * spread / math.sqrt(seeds)


def corrected(p: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979).

    Args:
        p: One a claim.

    Example:
        >>> corrected([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order, found, least = sorted(range(len(p)), key=lambda claim: p[claim]), [0.0] * len(p), 0.0
    for rank, claim in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[claim]))
        found[claim] = least
    return found


def verdict(effect: Effect, p: float) -> str:
    """Judges a claim that a difference is positive.

    Args:
        effect: What was found.
        p: Its p-value, corrected for the number of claims.
    """
    if p >= ALPHA:
        return "undecided"
    return "supported" if effect.mean > 0 else "contradicted"
