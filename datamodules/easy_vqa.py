"""Shards out of the PyPI package `easy_vqa` (MIT, https://github.com/vzhou842/easy-VQA): 5,000 real images.

Three sets come out: `captions` (one sentence an image), `vqa` (all questions of an image) and `text`
(the same questions about a described scene, without an image).
"""

from __future__ import annotations

import importlib
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from datamodules.index import Shard
from datamodules.sets import DESCRIBE, SETS, write_sets
from datamodules.shards import Entry, conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_MARK

logger = logging.getLogger(__name__)

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
VAL_EVERY = 20
"""Every 20th image of the package's train split is kept for validation; the official test split is left alone."""

SCENES = (
    "{colour} {shape}.",
    "the image shows a {colour} {shape}.",
    "there is a {shape} and it is {colour}.",
    "you can see one {shape}; the color of the {shape} is {colour}.",
    "a small picture with a {colour} {shape} in it.",
    "somebody drew a single {shape} with {colour} paint on a sheet of white paper.",
    "this is a small picture with a white background and in it there is one {colour} {shape}.",
    "look, in the middle of nothing else: one {shape}, all of it {colour}.",
)
"""Sentences of clearly different lengths, so that nothing can be learned from a word's place."""


@dataclass(frozen=True)
class Picture:
    """All that the package says about one image.

    Attributes:
        key: Its number, with leading zeros.
        questions: Pairs of question and answer, in the package's order.
        path: Its file.
    """

    key: str
    questions: tuple[tuple[str, str], ...]
    path: Path


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    colour: str
    shape: str

    @property
    def caption(self) -> str:
        """A short sentence, as `a blue rectangle`."""
        return f"a {self.colour} {self.shape}"


def derive_scene(questions: Iterable[tuple[str, str]], key: str = "image") -> Scene | None:
    """Finds colour and shape of an image by reasoning over its questions and answers; None where they leave it open.

    Raises:
        UserError: If the answers contradict each other.
    """
    possible = {"colour": set(COLOURS), "shape": set(SHAPES)}
    for question, answer in questions:
        words = re.findall(r"[a-z]+", question)
        for kind, known in (("colour", COLOURS), ("shape", SHAPES)):
            named = {word for word in words if word in known}
            if answer in ("yes", "no"):
                present = (answer == "yes") != bool({"no", "not"} & set(words))
            else:
                named |= {answer} & set(known)
                present = True
            if named:
                possible[kind] = possible[kind] & named if present else possible[kind] - named
    if not all(possible.values()):
        raise UserError(f"easy_vqa: the answers about {key} contradict each other. Install the package again.")
    if any(len(values) > 1 for values in possible.values()):
        return None
    return Scene(*(next(iter(possible[kind])) for kind in ("colour", "shape")))


def describe(scene: Scene, key: str, turn: int) -> str:
    """Returns a sentence for a scene; which one depends on image and turn alone."""
    number = zlib.crc32(f"{key}/{turn}".encode()) % len(SCENES)
    return SCENES[number].format(colour=scene.colour, shape=scene.shape)


def caption_entries(pictures: Iterable[Picture], scenes: Mapping[str, Scene]) -> Iterator[Entry]:
    """Yields one caption for each image whose scene is known."""
    for picture in pictures:
        if picture.key in scenes:
            turns = conversation((f"{IMAGE_MARK}\n{DESCRIBE}", scenes[picture.key].caption))
            yield Entry(picture.key, turns, (picture.path.read_bytes(),))


def vqa_entries(pictures: Iterable[Picture]) -> Iterator[Entry]:
    """Yields every image with all its questions; the first one carries the image."""
    for picture in pictures:
        turns = conversation(*picture.questions)
        turns[0]["value"] = f"{IMAGE_MARK}\n{turns[0]['value']}"
        yield Entry(picture.key, turns, (picture.path.read_bytes(),))


def text_entries(pictures: Iterable[Picture], scenes: Mapping[str, Scene]) -> Iterator[Entry]:
    """Yields the questions about each known scene, which every question tells anew in words."""
    for picture in pictures:
        if picture.key in scenes:
            scene = scenes[picture.key]
            questions = [*picture.questions, (DESCRIBE, scene.caption)]
            turns = [
                (f"{describe(scene, picture.key, number)} {question}", answer)
                for number, (question, answer) in enumerate(questions)
            ]
            yield Entry(picture.key, conversation(*turns))


def read_split(package: ModuleType, split: str) -> list[Picture]:
    """Reads one split of the package, by rising image number.

    Raises:
        UserError: If an image has no question or a question has no image.
    """
    texts, answers, numbers = getattr(package, f"get_{split}_questions")()
    paths = getattr(package, f"get_{split}_image_paths")()
    questions: dict[int, list[tuple[str, str]]] = {}
    for text, answer, number in zip(texts, answers, numbers, strict=True):
        questions.setdefault(number, []).append((text, answer))
    if questions.keys() != paths.keys():
        lost = sorted(questions.keys() ^ paths.keys())
        raise UserError(f"easy_vqa: images and questions of {split} differ at {lost[:5]}. Install the package again.")
    return [Picture(f"{number:05d}", tuple(questions[number]), Path(paths[number])) for number in sorted(questions)]


def pictures_of(package: ModuleType, split: str) -> list[Picture]:
    """Returns the images of `train`, `val` or `test`."""
    pictures = read_split(package, "test" if split == "test" else "train")
    if split == "test":
        return pictures
    return [picture for n, picture in enumerate(pictures) if (n % VAL_EVERY == 0) == (split == "val")]


def build_easy_vqa(out: Path, samples_per_shard: int = 1000) -> dict[str, list[Shard]]:
    """Builds the three shard sets, each with `train`, `val` and `test`, and a tokenizer; see `write_sets`.

    Raises:
        UserError: If the package is not installed or damaged, or the folder holds something else.
    """
    try:
        package = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise UserError("Expected the package `easy_vqa`, found none. Run `pip install easy-vqa`.") from error
    return write_sets(Path(out), lambda split: _entries(pictures_of(package, split), split), samples_per_shard)


def _entries(pictures: list[Picture], split: str) -> dict[str, list[Entry]]:
    found = {picture.key: derive_scene(picture.questions, f"{split} image {picture.key}") for picture in pictures}
    scenes = {key: scene for key, scene in found.items() if scene is not None}
    logger.info(
        "easy-VQA %s: the scene of %d of %d images follows from their questions; the other %d are left out of captions "
        "and text, and kept in vqa.",
        split,
        len(scenes),
        len(pictures),
        len(pictures) - len(scenes),
    )
    entries = (caption_entries(pictures, scenes), vqa_entries(pictures), text_entries(pictures, scenes))
    return dict(zip(SETS, map(list, entries), strict=True))
