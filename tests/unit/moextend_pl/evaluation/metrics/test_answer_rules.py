"""Normalised answers and soft scores: published vectors, outputs of the published programs, the rule said otherwise.

`fixtures/answer_rules.json` holds what VQA's `vqaEval.py` (v2.0), LLaVA's `m4c_evaluator.py`, pycocoevalcap 1.2 and
anls 0.0.2 said to the answers of `helpers/random_answers.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.random_answers import answers, misspelt, panels

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics import (
    ANLS,
    ExactMatch,
    GQAAccuracy,
    VQAAccuracy,
    anls,
    evalai_answer,
    gqa_answer,
    vqa_accuracy,
    vqa_answer,
)


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[4] / "fixtures" / "answer_rules.json").read_text())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat.", "cat"), ("a-b", "b"), ("Two dogs", "2 dogs"), (" None ", "0"), ("1,000", "1000"),
        ("dont", "don't"), ("red/blue", "red blue"), ("10:30", "10:30"), ("it's 3.5 m", "it 's 3.5 m"),
        ("$5.00", "$5.00"), ("U.S.A.", "usa"),
    ],
)  # fmt: skip
def test_published_vectors(text: str, expected: str) -> None:
    assert evalai_answer(text) == expected
    assert vqa_answer(text) == ("it's 3.5 m" if text == "it's 3.5 m" else expected)


def test_answers_become_what_the_published_programs_make_of_them(programs: dict[str, Any]) -> None:
    assert [row[0] for row in programs["vqa"]] == answers(1, 150)
    for text, vqa, evalai in programs["vqa"]:
        assert (vqa_answer(text), evalai_answer(text)) == (vqa, evalai)


def test_scores_are_those_of_the_published_programs(programs: dict[str, Any]) -> None:
    for prediction, people, official, textvqa in programs["panels"]:
        assert vqa_accuracy(prediction, people) == pytest.approx(official, abs=1e-9)
        assert vqa_accuracy(prediction, people, "evalai") == textvqa


APOSTROPHES = {
    "dont": "don't", "aint": "ain't", "theyre": "they're", "couldn'tve": "couldn't've", "wouldnt've": "wouldn't've",
    "'ows'at": "'ow's'at",
}  # fmt: skip


def stated_otherwise(text: str) -> str:
    """The rule of VQAv2, character by character."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    comma = any(text[i].isdigit() and text[i + 1] == "," and text[i + 2].isdigit() for i in range(len(text) - 2))
    gone = {m for m in ';/[]"{}()=+\\_-><@`,?!' if comma or f" {m}" in text or f"{m} " in text}
    spaced = "".join("" if c in gone else " " if c in ';/[]"{}()=+\\_-><@`,?!' else c for c in text)
    kept, stops = [], 0
    for i, c in enumerate(spaced):
        if c == "." and not spaced[i + 1 : i + 2].isdecimal() and stops < 32:
            stops += 1
        else:
            kept.append(c)
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    found = []
    for word in "".join(kept).lower().split():
        word = "0" if word == "none" else str(numbers.index(word)) if word in numbers else word
        if word not in ("a", "an", "the"):
            found.append(APOSTROPHES.get(word, word))
    return " ".join(found)


def test_a_thousand_answers_agree_with_the_rule_said_otherwise() -> None:
    for text in [*answers(11, 1000), "." * 40 + " a . b", ". ".join("ab" * 30)]:
        assert vqa_answer(text) == stated_otherwise(text)


def test_a_thousand_panels_agree_with_the_closed_form() -> None:
    scores = set()
    for prediction, people in panels(12, 1000):
        normal = [stated_otherwise(p) for p in people] if len({p.strip() for p in people}) > 1 else None
        said = stated_otherwise(prediction) if normal else prediction.replace("\n", " ").replace("\t", " ").strip()
        told = normal or [p.replace("\n", " ").replace("\t", " ").strip() for p in people]
        agreeing = min(sum(p == said for p in told), 4)
        expected = [0, 0.3, 0.6, 0.9, 1][agreeing]
        scores.add(expected)
        assert vqa_accuracy(prediction, people) == pytest.approx(expected, abs=1e-12)
    assert scores == {0, 0.3, 0.6, 0.9, 1}


def test_unanimous_people_are_normalised_by_lmms_eval_only() -> None:
    assert vqa_accuracy("2", ["two"] * 10, "official") == 0
    assert vqa_accuracy("2", ["two"] * 10, "lmms_eval") == 1
    assert vqa_accuracy("2", ["two"] * 9 + ["2"], "official") == 1


def test_accuracy_is_told_by_type_of_answer() -> None:
    metric = VQAAccuracy()
    truths = [
        {"answers": ["yes"] * 10, "answer_type": "yes/no"},
        {"answers": ["3"] * 2 + ["4"] * 8, "answer_type": "number"},
    ]
    metric.update(["a", "b"], ["yes", "3"], truths)
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert scores == pytest.approx({"accuracy": 0.8, "accuracy/yes/no": 1.0, "accuracy/number": 0.6})


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="official, lmms_eval, evalai"):
        VQAAccuracy("vqa")
    with pytest.raises(UserError, match="got none"):
        vqa_accuracy("yes", [])


def levenshtein(first: str, second: str) -> int:
    """Edit distance by a whole table."""
    table = [[i + j if not i * j else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i in range(1, len(first) + 1):
        for j in range(1, len(second) + 1):
            swap = table[i - 1][j - 1] + (first[i - 1] != second[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, swap)
    return table[-1][-1]


def test_anls_is_that_of_the_independent_library(programs: dict[str, Any]) -> None:
    scores = [anls(prediction, people) for prediction, people in misspelt(9, 200)]
    assert scores == pytest.approx(programs["anls"], abs=1e-11)
    assert sum(0 < score < 1 for score in scores) > 20


def test_anls_of_random_texts_follows_the_definition() -> None:
    for prediction, people in misspelt(13, 150):
        best = 0.0
        for person in people:
            said, told = (" ".join(text.lower().split()) for text in (prediction, person))
            distance = levenshtein(said, told) / max(len(said), len(told), 1)
            best = max(best, 1 - distance if distance < 0.5 else 0)
        assert anls(prediction, people) == pytest.approx(best, abs=1e-12)


def test_half_of_the_characters_is_another_answer() -> None:
    assert anls("ab", ["ac"]) == 0.0
    assert anls("abc", ["abd"]) == pytest.approx(2 / 3)
    assert ANLS().score([{"key": "a", "prediction": "abc", "truth": ["abd", "x"]}]) == {"anls": pytest.approx(2 / 3)}


def test_exact_match_and_gqa() -> None:
    rows = [("a", "Blue ", "blue"), ("b", "red", ["green", "RED"]), ("c", "no", "yes")]
    records = [{"key": k, "prediction": p, "truth": t} for k, p, t in rows]
    assert ExactMatch().score(records) == {"exact_match": pytest.approx(2 / 3)}
    assert gqa_answer("Left..") == "left"
    truths = [{"answer": "left", "type": "query"}, {"answer": "Left", "type": "verify"}, "left"]
    rows = [{"key": str(n), "prediction": "Left.", "truth": truth} for n, truth in enumerate(truths)]
    scores = GQAAccuracy().score(rows)
    assert scores == pytest.approx({"accuracy": 2 / 3, "accuracy/query": 1.0, "accuracy/verify": 0.0})
