"""Agreement with ten people, each of whom is left out once: VQAv2 and TextVQA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics.answer_text import evalai_answer, plain_spaces, vqa_answer
from moextend_pl.evaluation.metrics.keyed import MeanMetric, Record

ENOUGH = 3
PROTOCOLS = ("official", "lmms_eval", "evalai")


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the mean, over each person left out, of min(1, agreeing others / 3); texts are normalised already.

    For ten people and n that agree: 0, 0.3, 0.6, 0.9, and 1 from four on.

    Source: Antol et al. 2015 (arXiv 1505.00468), as https://visualqa.org/evaluation.html states it now.

    Example:
        >>> soft_score("blue", ["blue"] * 2 + ["red"] * 8)
        0.6
    """
    agreeing = [answer == prediction for answer in answers]
    # In the order and with the divisions of the published program: the same float.
    return sum(min(1.0, (sum(agreeing) - one) / ENOUGH) for one in agreeing) / len(agreeing)


def vqa_accuracy(prediction: str, answers: Sequence[str], protocol: str = "official") -> float:
    """Scores an answer against those of ten people.

    Args:
        prediction: What the model said.
        answers: What people said, as published.
        protocol: `official`, VQAv2's own program: it normalises nothing but outer and line spaces where all people said
            the same; `lmms_eval` always normalises; `evalai` is TextVQA's processor.

    Raises:
        UserError: If there are no answers, or no such protocol.
    """
    if not answers:
        raise UserError("Expected the answers of people for each question, got none. Score a split that has them.")
    if protocol == "official":
        clean = vqa_answer if len({plain_spaces(answer) for answer in answers}) > 1 else plain_spaces
        return soft_score(clean(prediction), [clean(answer) for answer in answers])
    if protocol == "lmms_eval":
        return soft_score(vqa_answer(prediction), [vqa_answer(answer) for answer in answers])
    if protocol == "evalai":
        return soft_score(evalai_answer(prediction), [evalai_answer(answer) for answer in answers])
    raise UserError(f"Expected one of {', '.join(PROTOCOLS)} as protocol of VQA accuracy, got {protocol!r}.")


class VQAAccuracy(MeanMetric):
    """VQA accuracy of VQAv2 (`official`, `lmms_eval`) and TextVQA (`evalai`).

    A truth is a list of people's answers, or `{"answers": [...], "answer_type": ...}`, by whose type the score is
    given too.

    Args:
        protocol: As in `vqa_accuracy`.
        options: Those of torchmetrics.
    """

    def __init__(self, protocol: str = "official", **options: Any) -> None:
        super().__init__(**options)
        vqa_accuracy("", [""], protocol)
        self.rule = protocol

    def of(self, record: Record) -> float:
        """Returns the soft score of one answer."""
        truth = record["truth"]
        return vqa_accuracy(record["prediction"], truth["answers"] if isinstance(truth, dict) else truth, self.rule)

    def groups(self, record: Record) -> list[str]:
        """Returns the type of the answer, where the set tells it."""
        truth = record["truth"]
        return [truth["answer_type"]] if isinstance(truth, dict) and truth.get("answer_type") else []
