"""Scores of one answer against those expected: equal text, and nearly equal text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from moextend_pl.evaluation.metrics.keyed import MeanMetric, Record
from moextend_pl.training.answers import exact_match

THRESHOLD = 0.5


def gqa_answer(text: str) -> str:
    """Returns an answer as LLaVA hands it to GQA's program: full stops at its end removed, lower case.

    Source: `scripts/convert_gqa_for_eval.py` of https://github.com/haotian-liu/LLaVA.
    """
    return text.rstrip(".").lower()


def edit_distance(first: str, second: str) -> int:
    """Returns how many characters must be put in, taken out or changed to make one text of another."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = THRESHOLD) -> float:
    """Returns one minus the least edit distance to an answer, relative to the longer text; 0 from the threshold on.

    Case and the number of spaces do not count.

    Source: Biten et al. 2019 (arXiv 1905.13648), equation 1.

    Args:
        prediction: What the model said.
        answers: Any of these is right.
        threshold: Distance from which an answer counts as another one.

    Example:
        >>> anls("blu", ["blue", "red"])
        0.75
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        expected = " ".join(answer.lower().split())
        longer = max(len(said), len(expected))
        distance = edit_distance(said, expected) / longer if longer else 0.0
        best = max(best, 1.0 - distance if distance < threshold else 0.0)
    return best


class ExactMatch(MeanMetric):
    """Share of answers that are equal but for case and outer white space; a truth is a text, or several of them."""

    name: ClassVar[str] = "exact_match"

    def of(self, record: Record) -> float:
        """Returns 1 for an equal answer."""
        truths = [record["truth"]] if isinstance(record["truth"], str) else record["truth"]
        return float(any(exact_match(record["prediction"], truth) for truth in truths))


class GQAAccuracy(MeanMetric):
    """GQA's accuracy: exactly the answer; a truth is a text, or `{"answer": ..., "type": ...}` to score by type too.

    What LLaVA does to a prediction is done, nothing to the answer: both are compared as they are.
    """

    def of(self, record: Record) -> float:
        """Returns 1 for the same text."""
        truth = record["truth"]
        return float(gqa_answer(record["prediction"]) == (truth["answer"] if isinstance(truth, dict) else truth))

    def groups(self, record: Record) -> list[str]:
        """Returns the structural type of the question, where the set tells it."""
        truth = record["truth"]
        return [truth["type"]] if isinstance(truth, dict) and truth.get("type") else []


class ANLS(MeanMetric):
    """Average normalised Levenshtein similarity, of DocVQA and InfographicVQA; a truth is a list of answers."""

    name: ClassVar[str] = "anls"

    def of(self, record: Record) -> float:
        """Returns the similarity to the nearest answer."""
        return anls(record["prediction"], record["truth"])
