"""Questions answered by yes or no: POPE and MME, each with its own reading of an answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics.keyed import KeyedMetric, Record, Sums, Totals, ratio

POPE_READINGS = ("llava", "lmms_eval")
NEGATIONS = {"No", "not", "no"}
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(text: str, reading: str = "llava") -> str:
    """Returns `yes` or `no`; of lmms-eval's reading also another text, which is wrong.

    Args:
        text: What the model said.
        reading: `llava`: `no` if a word of the first sentence is No, not or no, else `yes`. `lmms_eval`: the text
            itself, lower.

    Source: `llava/eval/eval_pope.py` of https://github.com/haotian-liu/LLaVA; `tasks/pope/utils.py` of lmms-eval.

    Raises:
        UserError: If there is no such reading.

    Example:
        >>> pope_answer("There is not a dog.")
        'no'
    """
    if reading == "lmms_eval":
        return text.lower().strip()
    if reading != "llava":
        raise UserError(f"Expected one of {', '.join(POPE_READINGS)} as reading of POPE's answers, got {reading!r}.")
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if NEGATIONS.intersection(words) else "yes"


class POPEScore(KeyedMetric):
    """POPE: accuracy, precision, recall and F1 of `yes`, and the share of predicted `yes`.

    A truth is `{"label": "yes" or "no", "category": "random", "popular" or "adversarial"}`. Each score is given for all
    questions together and by category; `mean_f1` is the mean of the categories' F1, the number that LLaVA reports.

    Args:
        reading: How answers are read, as in `pope_answer`.
        options: Those of torchmetrics.
    """

    def __init__(self, reading: str = "llava", **options: Any) -> None:
        super().__init__(**options)
        pope_answer("", reading)
        self.reading = reading

    def units(self, records: Sequence[Record]) -> dict[str, Sums]:
        """Returns right and wrong answers of each kind, by sample."""
        found = {}
        for record in records:
            said, truth = pope_answer(record["prediction"], self.reading), record["truth"]
            right, positive = said == truth["label"], truth["label"] == "yes"
            kinds = {(True, True): "tp", (True, False): "tn", (False, True): "fn", (False, False): "fp"}
            # Neither yes nor no is wrong, and enters neither precision nor recall: so lmms-eval counts.
            kind = kinds[right, positive] if said in ("yes", "no") else "neither"
            sums = {f"{group}{kind}": 1.0 for group in ("", f"{truth['category']}/")}
            sums |= {f"{group}yes": float(said == "yes") for group in ("", f"{truth['category']}/")}
            found[record["key"]] = sums
        return found

    def values(self, totals: Totals) -> dict[str, Any]:
        """Returns the scores of all questions and of each category."""
        categories = sorted({name.rpartition("/")[0] for name in totals} - {""})
        scores = self._scores(totals, "")
        for category in categories:
            scores |= {f"{name}/{category}": value for name, value in self._scores(totals, f"{category}/").items()}
        scores["mean_f1"] = sum(scores[f"f1/{category}"] for category in categories) / max(len(categories), 1)
        return scores

    @staticmethod
    def _scores(totals: Totals, prefix: str) -> dict[str, Any]:
        kinds = ("tp", "tn", "fn", "fp", "neither", "yes")
        tp, tn, fn, fp, neither, yes = (totals.get(f"{prefix}{kind}", 0.0) for kind in kinds)
        count = tp + tn + fn + fp + neither
        return {
            "accuracy": ratio(tp + tn, count),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn),
            "yes_ratio": ratio(yes, count),
        }


def mme_answer(text: str) -> str:
    """Returns `yes`, `no` or `other`, which is wrong.

    A text that is no `yes` or `no` is read by its first four characters: "Not sure" is a no, "The answer is yes" is
    other.

    Source: `eval_tool/calculation.py` of MME (arXiv 2306.13394).

    Example:
        >>> mme_answer("Yes, it is."), mme_answer("The answer is yes")
        ('yes', 'other')
    """
    said = text.lower().strip().replace(".", "")
    return next((word for word in ("yes", "no") if word in (said if said in ("yes", "no") else said[:4])), "other")


class MMEScore(KeyedMetric):
    """MME: of each subtask accuracy by question (0 to 100) plus accuracy by picture, both questions right (0 to 100).

    A truth is `{"label": "yes" or "no", "subtask": ..., "image": name of the picture}`. `perception` is the sum over
    its ten subtasks (2,000 at most), `cognition` over its four (800), `total` over all.
    """

    def units(self, records: Sequence[Record]) -> dict[str, Sums]:
        """Returns right answers and questions, right pictures and pictures, by picture of a subtask.

        Raises:
            UserError: If a picture has other than two questions, on which the protocol rests.
        """
        pictures: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for record in records:
            truth = record["truth"]
            right = mme_answer(record["prediction"]) == truth["label"].lower()
            pictures[truth["subtask"], truth["image"]].append(right)
        for (subtask, image), answers in pictures.items():
            if len(answers) != 2:
                raise UserError(
                    f"Expected two questions about each picture of MME, got {len(answers)} about {subtask}/{image}. "
                    "Score whole pictures."
                )
        return {
            f"{subtask}/{image}": {
                f"{subtask}/right": float(sum(answers)),
                f"{subtask}/questions": 2.0,
                f"{subtask}/both": float(all(answers)),
                f"{subtask}/pictures": 1.0,
            }
            for (subtask, image), answers in pictures.items()
        }

    def values(self, totals: Totals) -> dict[str, Any]:
        """Returns the three sums, and accuracy, accuracy+ and score of each subtask."""
        found: dict[str, Any] = {"total": 0.0}
        for subtask in sorted({name.rpartition("/")[0] for name in totals}):
            accuracy = 100 * ratio(totals[f"{subtask}/right"], totals[f"{subtask}/questions"])
            plus = 100 * ratio(totals[f"{subtask}/both"], totals[f"{subtask}/pictures"])
            found |= {f"acc/{subtask}": accuracy, f"acc+/{subtask}": plus, f"score/{subtask}": accuracy + plus}
            kind = next((k for k, names in _KINDS.items() if subtask in names), None)
            for name in ("total", kind) if kind else ("total",):
                found[name] = found.get(name, 0.0) + accuracy + plus
        return found


_KINDS = {"perception": PERCEPTION, "cognition": COGNITION}
