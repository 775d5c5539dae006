"""POPE, MME, ScienceQA and MMBench: published vectors, and the rules said otherwise on random answers."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from helpers.random_answers import answers
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score, binary_precision, binary_recall

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics import (
    CircularAccuracy,
    MMEScore,
    POPEScore,
    ScienceQAAccuracy,
    chosen_option,
    mme_answer,
    pope_answer,
    scienceqa_letter,
)

EIGHT = ["Yes", "Yes.", "yes, there is a dog.", "No", "No.", "There is no dog.", "There is not a dog.", "no"]
LABELS = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]


def pope_records(predictions: list[str], labels: list[str], category: str = "random") -> list[Any]:
    rows = enumerate(zip(predictions, labels, strict=True))
    return [
        {"key": f"{category}{n}", "prediction": p, "truth": {"label": t, "category": category}} for n, (p, t) in rows
    ]


def test_eight_answers_score_as_published() -> None:
    scores = POPEScore().score(pope_records(EIGHT, LABELS))
    assert scores["accuracy"] == 0.875
    assert scores["precision"] == 1.0
    assert scores["recall"] == 0.75
    assert scores["f1"] == pytest.approx(0.857, abs=5e-4)
    assert scores["yes_ratio"] == 0.375
    other = POPEScore(reading="lmms_eval").score(pope_records(EIGHT, LABELS))
    assert other["accuracy"] == 0.25
    assert other["f1"] == pytest.approx(0.667, abs=5e-4)


def test_pope_of_random_answers_is_binary_classification() -> None:
    draw = random.Random(0)
    said = answers(21, 1000)
    labels = [draw.choice(["yes", "no"]) for _ in said]
    predicted = []
    for text in said:
        first = text[: text.find(".")] if "." in text else text
        predicted.append(0 if re.search(r"(^| )(No|not|no)(?= |$)", first.replace(",", "")) else 1)
    assert predicted == [int(pope_answer(text) == "yes") for text in said]
    a, b = torch.tensor(predicted), torch.tensor([int(label == "yes") for label in labels])
    scores = POPEScore().score(pope_records(said, labels))
    for name, function in (
        ("accuracy", binary_accuracy), ("precision", binary_precision), ("recall", binary_recall),
        ("f1", binary_f1_score),
    ):  # fmt: skip
        assert scores[name] == pytest.approx(function(a, b).item(), abs=1e-6)
    assert scores["yes_ratio"] == pytest.approx(sum(predicted) / 1000)


def test_pope_reports_the_mean_of_its_categories() -> None:
    records = pope_records(EIGHT, LABELS) + pope_records(["Yes"] * 4, ["yes", "no", "no", "no"], "adversarial")
    scores = POPEScore().score(records)
    assert scores["f1/adversarial"] == pytest.approx(0.4)
    assert scores["mean_f1"] == pytest.approx((6 / 7 + 0.4) / 2)
    assert scores["f1"] == pytest.approx(8 / 12)


def test_pope_without_a_yes_divides_by_nothing() -> None:
    assert POPEScore().score(pope_records(["no"], ["no"]))["f1"] == 0
    with pytest.raises(UserError, match="llava, lmms_eval"):
        POPEScore("strict")


def mme_records(rows: list[tuple[str, str, str, str]]) -> list[Any]:
    return [
        {"key": f"{s}/{i}/{n}", "prediction": p, "truth": {"subtask": s, "image": i, "label": label}}
        for n, (s, i, p, label) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"), ("no", "no"), ("Not sure", "no"), ("The answer is yes", "other"), (" Yes, it is", "yes"),
        ("", "other"), ("y.e.s", "yes"), ("I know", "other"), ("Is no", "other"), ("a no", "no"),
    ],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(text: str, expected: str) -> None:
    assert mme_answer(text) == expected


def test_mme_reads_random_answers_by_its_rule() -> None:
    for text in answers(22, 1000):
        said = text.strip().lower().replace(".", "")
        head = said[0:4]
        assert mme_answer(text) == ("yes" if "yes" in head else "no" if "no" in head else "other")


def test_mme_adds_accuracy_by_question_and_by_picture() -> None:
    rows = [("count", "1", "yes", "yes"), ("count", "1", "no", "no")]
    rows += [("count", "2", "yes", "yes"), ("count", "2", "yes", "no")]
    scores = MMEScore().score(mme_records(rows))
    assert scores["acc/count"] == 75
    assert scores["acc+/count"] == 50
    assert scores["perception"] == scores["total"] == 125
    more = [("code_reasoning", "1", "yes", "Yes"), ("code_reasoning", "1", "other", "No")]
    scores = MMEScore().score(mme_records(rows + more))
    assert (scores["perception"], scores["cognition"], scores["total"]) == (125, 50, 175)


def test_half_a_picture_of_mme_is_refused() -> None:
    with pytest.raises(UserError, match=r"two questions about each picture of MME, got 1 about count/1"):
        MMEScore().score(mme_records([("count", "1", "yes", "yes")]))


def test_scienceqa_reads_a_letter_by_three_rules() -> None:
    said = {
        "A": "A", "F": None, "AB": None, "": None, "B. blue": "B", "B.": None, "B.blue": None, "The answer is C.": "C",
        "So. The answer is D!": "D", "The answer is C": None, "The answer is A. The answer is B.": None, "b": None,
    }  # fmt: skip
    assert {text: scienceqa_letter(text) for text in said} == said


def test_scienceqa_of_random_answers_follows_its_rule() -> None:
    hits = 0
    for text in [*answers(23, 1000), *(f"{letter}. x" for letter in "ABCDEF")]:
        expected = text if re.fullmatch("[A-E]", text) else None
        if expected is None and re.match(r"[A-E]\. ", text):
            expected = text[0]
        elif expected is None:
            parts = re.split("The answer is ", text)[1:]
            found = [part[0] for part in parts if len(part) > 1 and part[0] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                     and part[1] != "\n"]  # fmt: skip
            expected = found[0] if len(found) == 1 else None
        hits += expected is not None
        assert scienceqa_letter(text) == expected
    assert hits > 5


def test_scienceqa_keeps_questions_with_a_picture_apart() -> None:
    truths = [(2, True, "A"), (2, True, "A"), (2, False, "C")]
    records: list[Any] = [
        {"key": str(n), "prediction": said, "truth": {"answer": "A", "choices": count, "image": image}}
        for n, ((count, image, _), said) in enumerate(zip(truths, ["A", "B", "A"], strict=True))
    ]
    assert ScienceQAAccuracy().score(records) == {
        "accuracy": pytest.approx(2 / 3), "accuracy/IMG": 0.5, "accuracy/TXT": 1.0
    }  # fmt: skip
    beyond: Any = {"key": "x", "prediction": "C", "truth": {"answer": "C", "choices": 2, "image": True}}
    assert ScienceQAAccuracy().score([beyond])["accuracy"] == 0


OPTIONS = {"A": "red", "B": "blue", "C": "a red and blue bus"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"), ("(B)", "B"), ("B. blue", "B"), ("The answer is B", "B"), ("A", "A"), ("A bus is there", None),
        ("it is Blue", "B"), ("A or B", None), ("green", None), ("", None), ("a red and blue bus", None),
    ],
)  # fmt: skip
def test_option_is_its_only_letter_or_its_only_text(text: str, expected: str | None) -> None:
    assert chosen_option(text, OPTIONS) == expected


def circular_records(rotations: dict[str, list[bool]]) -> list[Any]:
    return [
        {
            "key": f"{group}/{n}",
            "prediction": "A" if right else "B",
            "truth": {"answer": "A", "options": {"A": "x", "B": "y"}, "group": group, "l2": f"level {len(group)}"},
        }
        for group, answered in rotations.items()
        for n, right in enumerate(answered)
    ]


def test_circular_question_is_right_only_in_every_rotation() -> None:
    scores = CircularAccuracy().score(circular_records({"q": [True, True], "r": [True, False], "ss": [True] * 4}))
    assert scores["circular"] == pytest.approx(2 / 3)
    assert scores["vanilla"] == pytest.approx(7 / 8)
    assert scores["circular/l2/level 1"] == 0.5
    assert scores["circular/l2/level 2"] == 1.0


def test_circular_of_random_answers_is_a_product() -> None:
    draw = random.Random(3)
    rotations = {f"g{n}": [draw.random() < 0.8 for _ in range(draw.randint(2, 4))] for n in range(300)}
    scores = CircularAccuracy().score(circular_records(rotations))
    expected = sum(min(answered) for answered in rotations.values()) / 300
    assert scores["circular"] == pytest.approx(expected)
