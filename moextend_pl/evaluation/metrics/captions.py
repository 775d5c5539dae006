"""CIDEr-D of captions: agreement with people in words that are rare in the whole set.

Words are found by `ptb_words`, in place of the Java tokenizer of the published program; the result says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from moextend_pl.evaluation.metrics.keyed import KeyedMetric, Record, Sums, Totals, ratio

ORDERS = 4
SIGMA = 6.0
CLITICS = re.compile(r"('s|'m|'d|'ll|'re|'ve|n't)\b")
JOINED = re.compile(r"\b(can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b))")
# Clitics, abbreviations with their full stops, numbers with their points, words with their hyphens; else one character.
WORD = re.compile(
    r"n't|'(?:s|m|d|ll|re|ve)\b|(?:[^\W\d_]\.){2,}|\b(?:mr|mrs|ms|dr|st|vs|jr|sr)\.|\bno\.(?=\s*\d)"
    r"|\d+(?:[.,:/]\d+)+|[^\W_]+(?:[-.'/@][^\W_]+)*|#+|\S"
)
MARKS = {"'", "`", '"', ".", "?", "!", ",", ":", "-", ";"}
# The published tokenizer lowers these after it has looked for marks: they stay, and count as words.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

Ngrams = Counter[tuple[str, ...]]


def ptb_words(text: str) -> list[str]:
    """Splits a caption into lower-case words much like the Penn Treebank, and leaves punctuation out.

    Brackets stay as words, as the published program leaves them.

    Example:
        >>> ptb_words("A man's dog, isn't it?")
        ['a', 'man', "'s", 'dog', 'is', "n't", 'it']
    """
    spaced = JOINED.sub(r"\1 ", CLITICS.sub(r" \1", text.lower().replace("\n", " ")))
    return [BRACKETS.get(word, word) for word in WORD.findall(spaced) if word not in MARKS]


def ngrams(words: Sequence[str]) -> Ngrams:
    """Counts the runs of one to four words."""
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


class _Vector:
    """Term frequency times inverse document frequency of a caption, by length of n-gram."""

    def __init__(self, counts: Ngrams, seen_in: Mapping[tuple[str, ...], int], log_captions: float) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            self.weights[len(gram) - 1][gram] = count * (log_captions - math.log(max(1.0, seen_in.get(gram, 0))))
        self.norms = [math.sqrt(sum(w * w for w in weights.values())) for weights in self.weights]
        # Pairs of words, not words: so the published program counts the length.
        self.length = sum(count for gram, count in counts.items() if len(gram) == 2)

    def agreement(self, reference: _Vector) -> float:
        """Returns the mean over lengths of the clipped cosine, times the penalty for another length."""
        penalty = math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for mine, theirs, norm, other in zip(self.weights, reference.weights, self.norms, reference.norms, strict=True):
            if norm and other:
                common = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
                total += common / (norm * other)
        return total * penalty / ORDERS


def cider_d(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    words_of: Callable[[str], list[str]] = ptb_words,
) -> list[float]:
    """Scores captions; the mean is what papers report, times 100.

    Args:
        candidates: One caption for each picture.
        references: What people wrote, several for each picture. How rare a word is, is counted in these: the score
            of a picture depends on the whole set, and means over parts of a set are not that of the set.
        words_of: Splits a caption.

    Source: Vedantam et al. 2015 (arXiv 1411.5726), equations 1 to 3, as in pycocoevalcap.

    Returns:
        One score for each picture, at least 0; 10 for a caption that is its only reference.
    """
    told = [[ngrams(words_of(text)) for text in texts] for texts in references]
    seen_in = Counter(gram for counts in told for gram in set().union(*counts))
    log_captions = math.log(len(told)) if told else 0.0
    scores = []
    for candidate, counts in zip(candidates, told, strict=True):
        mine = _Vector(ngrams(words_of(candidate)), seen_in, log_captions)
        agreements = [mine.agreement(_Vector(each, seen_in, log_captions)) for each in counts]
        scores.append(10.0 * sum(agreements) / len(agreements))
    return scores


class CIDErD(KeyedMetric):
    """CIDEr-D over the whole set; a truth is the list of a picture's captions. Papers report it times 100.

    Intervals draw pictures and keep the document frequencies of the whole set.
    """

    tokenizer: ClassVar[str] = "ptb_words"

    def units(self, records: Sequence[Record]) -> dict[str, Sums]:
        """Returns the score of each picture."""
        scores = cider_d([r["prediction"] for r in records], [r["truth"] for r in records])
        return {r["key"]: {"sum": score, "count": 1.0} for r, score in zip(records, scores, strict=True)}

    def values(self, totals: Totals) -> dict[str, Any]:
        """Returns the mean."""
        return {f"cider_d[{self.tokenizer}]": ratio(totals["sum"], totals["count"])}
