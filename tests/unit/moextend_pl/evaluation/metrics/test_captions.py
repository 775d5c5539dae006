"""CIDEr-D against pycocoevalcap's scores, and its words against the published tokenizer's."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from helpers.random_answers import captions

from moextend_pl.evaluation.metrics import CIDErD, cider_d, ptb_words

# What the Java program of pycocoevalcap 1.2 makes of them.
TREEBANK = {
    "A man's dog, isn't it?": "a man 's dog is n't it",
    "Two dogs (brown) play in U.S. park.": "two dogs -lrb- brown -rrb- play in u.s. park",
    'A well-known 3.5 m sign says "STOP".': "a well-known 3.5 m sign says stop",
    "It's 10:30 a.m. on Main St.": "it 's 10:30 a.m. on main st.",
    "A red/blue kite - flying.": "a red/blue kite flying",
    "They can't; he'll go.": "they ca n't he 'll go",
    "A man with a t-shirt & hat...": "a man with a t-shirt & hat",
    "cannot gonna dogs' bowls": "can not gon na dogs bowls",
    "A No. 5 bus at the 2nd stop": "a no. 5 bus at the 2nd stop",
    "$5.00 for 1,000 items!": "$ 5.00 for 1,000 items",
    "A sign reading 'open'": "a sign reading open",
    "A 1/2 eaten pizza": "a 1/2 eaten pizza",
    "Mr. Smith vs. Mrs. Jones": "mr. smith vs. mrs. jones",
    "half-eaten donuts #1 50% off": "half-eaten donuts # 1 50 % off",
    "a skier's jump\nnext line": "a skier 's jump next line",
}


def by_definition(candidates: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D from the paper's equations, one n-gram at a time."""

    def grams(text: str, n: int) -> Counter[str]:
        words = text.split()
        return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            seen = Counter(gram for texts in references for gram in {g for t in texts for g in grams(t, n)})
            vectors = [
                {g: c * math.log(len(references) / max(1, seen[g])) for g, c in grams(text, n).items()}
                for text in (candidate, *refs)
            ]
            norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]
            for vector, norm, ref in zip(vectors[1:], norms[1:], refs, strict=True):
                clipped = sum(min(value, vector.get(g, 0.0)) * vector.get(g, 0.0) for g, value in vectors[0].items())
                gap = max(len(candidate.split()) - 1, 0) - max(len(ref.split()) - 1, 0)
                if norm and norms[0]:
                    total += clipped / (norm * norms[0]) * math.exp(-(gap**2) / 72) / len(refs)
        scores.append(10 * total / 4)
    return scores


def test_scores_are_those_of_the_independent_library() -> None:
    expected = json.loads((Path(__file__).parents[4] / "fixtures" / "answer_rules.json").read_text())["cider"]
    said, told = zip(*captions(5, 60), strict=True)
    assert cider_d(said, told, str.split) == pytest.approx(expected, abs=1e-9)


def test_scores_follow_the_equations() -> None:
    said, told = (list(column) for column in zip(*captions(6, 40), strict=True))
    expected = by_definition(said, told)
    assert min(expected) < 0.5 < max(expected)
    assert cider_d(said, told, str.split) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("text", TREEBANK)
def test_words_are_those_of_the_published_tokenizer(text: str) -> None:
    assert " ".join(ptb_words(text)) == TREEBANK[text]


def test_score_is_of_the_whole_set_and_names_its_tokenizer() -> None:
    rows = [{"key": str(n), "prediction": said, "truth": told} for n, (said, told) in enumerate(captions(7, 30))]
    scores = CIDErD().score(rows)
    assert list(scores) == ["cider_d[ptb_words]"]
    expected = by_definition([r["prediction"] for r in rows], [r["truth"] for r in rows])
    assert scores["cider_d[ptb_words]"] == pytest.approx(sum(expected) / 30)
    halves = [CIDErD().score(part)["cider_d[ptb_words]"] for part in (rows[:15], rows[15:])]
    assert sum(halves) / 2 != pytest.approx(sum(expected) / 30, rel=1e-3)


def test_empty_caption_scores_nothing() -> None:
    assert cider_d(["", "a dog"], [["a red bus"], ["a dog"]])[0] == 0.0
