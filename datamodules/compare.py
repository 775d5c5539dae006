"""What of a test set can be answered without looking: pictures seen in training, and the most frequent answers."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from datamodules.reader import RawSample, ShardReader
from moextend_pl.samples.pixels import decode_image
from moextend_pl.samples.turns import IMAGE_MARK


@dataclass(frozen=True)
class Comparison:
    """A test set beside a training set.

    Attributes:
        pictures: Different pictures of the test set, by their pixels.
        shared_pictures: Those of them that are in the training set too.
        questions: Questions of the test set.
        blind_right: Those that the most frequent answer of the training set to the same words answers.
    """

    pictures: int
    shared_pictures: int
    questions: int
    blind_right: int

    @property
    def blind_accuracy(self) -> float:
        """Share of the questions that are answered without looking."""
        return self.blind_right / max(self.questions, 1)


def compare(train: str | Path, test: str | Path) -> Comparison:
    """Reads both sets and compares them.

    Args:
        train: Folder of shards, or the address of a remote one.
        test: Likewise.

    Raises:
        UserError: If a sample cannot be read.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    known: set[bytes] = set()
    for raw in _samples(train):
        known |= _pixels(raw)
        for question, answer in _pairs(raw):
            answers[question][answer] += 1
    shown: set[bytes] = set()
    questions = right = 0
    for raw in _samples(test):
        shown |= _pixels(raw)
        for question, answer in _pairs(raw):
            questions += 1
            right += bool(answers[question]) and answers[question].most_common(1)[0][0] == answer
    return Comparison(len(shown), len(shown & known), questions, right)


def _samples(place: str | Path) -> list[RawSample]:
    reader = ShardReader(place)
    return [reader.read(number) for number in range(len(reader))]


def _pixels(raw: RawSample) -> set[bytes]:
    pictures = (decode_image(data, raw.origin).convert("RGB") for data in raw.images)
    return {hashlib.sha256(f"{one.size}".encode() + one.tobytes()).digest() for one in pictures}


def _pairs(raw: RawSample) -> list[tuple[str, str]]:
    return [(turn.human.replace(IMAGE_MARK, "").strip().lower(), turn.gpt.strip().lower()) for turn in raw.turns]
