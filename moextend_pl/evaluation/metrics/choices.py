"""Multiple choice: ScienceQA's reading of a letter, and MMBench's circular evaluation."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from moextend_pl.evaluation.metrics.keyed import KeyedMetric, MeanMetric, Record, Sums, Totals, ratio

LETTERS = "ABCDE"
# The last dot stands for any character: so the published program has it.
SENTENCE = re.compile(r"The answer is ([A-Z]).")
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def scienceqa_letter(text: str) -> str | None:
    """Returns the letter of an answer, or None, which is wrong.

    A letter alone; else a letter, a full stop and a space at the start; else the only `The answer is X.`

    Source: `llava/eval/eval_science_qa.py` of https://github.com/haotian-liu/LLaVA, v1.5.

    Example:
        >>> scienceqa_letter("B. blue"), scienceqa_letter("I think B")
        ('B', None)
    """
    if text and text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


class ScienceQAAccuracy(MeanMetric):
    """ScienceQA by letter; a truth is `{"answer": letter, "choices": how many, "image": whether there is one}`.

    `accuracy/IMG` is that of questions with a picture, the number that papers on vision report; `accuracy/TXT` that of
    the rest.
    """

    def of(self, record: Record) -> float:
        """Returns 1 for the right letter; a letter beyond the choices is wrong."""
        letter, truth = scienceqa_letter(record["prediction"]), record["truth"]
        return float(letter is not None and letter in LETTERS[: truth["choices"]] and letter == truth["answer"])

    def groups(self, record: Record) -> list[str]:
        """Returns `IMG` or `TXT`."""
        return ["IMG" if record["truth"]["image"] else "TXT"]


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that a text names, or None, which is wrong.

    The only letter among its words, marks aside; an `A` in a text of more than three words may be an article and does
    not count. Else the only option whose text stands in it. Nothing is guessed: the tools that most people use draw a
    letter at random where both fail, or ask another model.

    Source: the exact matching of https://github.com/open-compass/VLMEvalKit.

    Args:
        text: What the model said.
        options: Text of each option by its letter.

    Example:
        >>> chosen_option("(B)", {"A": "red", "B": "blue"}), chosen_option("it is blue", {"A": "red", "B": "blue"})
        ('B', 'B')
    """
    words = text.translate(MARKS).split()
    letters = [letter for letter in options if letter in words and not (letter == "A" and len(words) > 3)]
    if len(letters) == 1:
        return letters[0]
    if letters:
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


class CircularAccuracy(KeyedMetric):
    """MMBench's CircularEval: a question is right only if it is right with its options in every rotation.

    A truth is `{"answer": letter, "options": {letter: text}, "group": question, "l2": ..., "category": ...}`; the last
    two may be left out. `circular` is the score; `vanilla` that of single rotations, much higher and never to
    be put beside it.
    """

    def units(self, records: Sequence[Record]) -> dict[str, Sums]:
        """Returns right questions and questions, right rotations and rotations, by question."""
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            groups[record["truth"]["group"]].append(record)
        return {group: self._sums(members) for group, members in groups.items()}

    @staticmethod
    def _sums(members: list[Record]) -> Sums:
        right = [chosen_option(r["prediction"], r["truth"]["options"]) == r["truth"]["answer"] for r in members]
        sums = {"right": float(all(right)), "questions": 1.0, "hits": float(sum(right)), "rotations": float(len(right))}
        truth = members[0]["truth"]
        for level in ("l2", "category"):
            if truth.get(level):
                sums |= {f"right/{level}/{truth[level]}": sums["right"], f"questions/{level}/{truth[level]}": 1.0}
        return sums

    def values(self, totals: Totals) -> dict[str, Any]:
        """Returns `circular`, over all and by L2 ability and category, and `vanilla`."""
        found = {"circular": ratio(totals["right"], totals["questions"])}
        for name, right in totals.items():
            if name.startswith("right/"):
                found[f"circular{name.removeprefix('right')}"] = ratio(
                    right, totals[name.replace("right", "questions", 1)]
                )
        return {**found, "vanilla": ratio(totals["hits"], totals["rotations"])}
