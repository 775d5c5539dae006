"""What a drawn scene is, which questions can be asked about it, and their answers.

A scene has four places, the quarters of the picture, and up to one thing in each. Every answer is one word and
follows from the scene alone; every thing that a question speaks of is named so that only one thing can be meant.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import product

COLOURS = ("blue", "green", "red", "yellow")
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
PLACES = tuple(product(ROWS, COLUMNS))
NUMBERS = ("zero", "one", "two", "three")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles"}

Pair = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Thing:
    """One drawn thing."""

    size: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """All that can be seen of it, as `small red circle`."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        things: The thing at each place of `PLACES`, None where it is empty.
    """

    things: tuple[Thing | None, ...]

    def placed(self) -> list[tuple[tuple[str, str], Thing]]:
        """Returns (row, column) and thing of every place that is not empty, row by row."""
        return [(place, thing) for place, thing in zip(PLACES, self.things, strict=True) if thing is not None]

    def named(self) -> list[tuple[str, tuple[str, str], Thing]]:
        """Returns (name, place, thing) for every colour or shape that only one thing of the scene has."""
        words = Counter(word for _, thing in self.placed() for word in (thing.colour, thing.shape))
        names = [(f"{thing.colour} thing", thing.colour, place, thing) for place, thing in self.placed()]
        names += [(thing.shape, thing.shape, place, thing) for place, thing in self.placed()]
        return [(name, place, thing) for name, word, place, thing in names if words[word] == 1]


def _colours(scene: Scene) -> Iterator[Pair]:
    for name, _, thing in scene.named():
        if name == thing.shape:
            yield f"what color is the {name}?", thing.colour


def _shapes(scene: Scene) -> Iterator[Pair]:
    for name, _, thing in scene.named():
        if name != thing.shape:
            yield f"what shape is the {name}?", thing.shape


def _sizes(scene: Scene) -> Iterator[Pair]:
    for name, _, thing in scene.named():
        yield f"is the {name} small or large?", thing.size


def _rows(scene: Scene) -> Iterator[Pair]:
    for name, (row, _), _ in scene.named():
        yield f"is the {name} at the top or at the bottom?", row


def _columns(scene: Scene) -> Iterator[Pair]:
    for name, (_, column), _ in scene.named():
        yield f"is the {name} on the left or on the right?", column


def _colours_by_place(scene: Scene) -> Iterator[Pair]:
    for (row, column), thing in scene.placed():
        yield f"what color is at the {row} {column}?", thing.colour


def _shapes_by_place(scene: Scene) -> Iterator[Pair]:
    for (row, column), thing in scene.placed():
        yield f"what shape is at the {row} {column}?", thing.shape


def _counts(scene: Scene) -> Iterator[Pair]:
    words = Counter(word for _, thing in scene.placed() for word in astuple(thing))
    for word in (*COLOURS, *SIZES):
        yield f"how many {word} things are there?", NUMBERS[words[word]]
    for shape, plural in PLURALS.items():
        yield f"how many {plural} are there?", NUMBERS[words[shape]]


def _existence(scene: Scene) -> Iterator[Pair]:
    """Asks for things that are there, and for things that differ from one of them in one respect only."""
    there = {(thing.colour, thing.shape) for _, thing in scene.placed()}
    near = {(colour, shape) for colour, _ in there for shape in SHAPES}
    near |= {(colour, shape) for _, shape in there for colour in COLOURS}
    for colour, shape in sorted(near):
        yield f"is there a {colour} {shape}?", "yes" if (colour, shape) in there else "no"


KINDS: dict[str, Callable[[Scene], Iterator[Pair]]] = {
    "color": _colours,
    "shape": _shapes,
    "size": _sizes,
    "row": _rows,
    "column": _columns,
    "color by place": _colours_by_place,
    "shape by place": _shapes_by_place,
    "count": _counts,
    "existence": _existence,
}
"""Kind of question -> all questions of that kind that a scene answers."""


def ask(scene: Scene, count: int, rng: random.Random) -> list[Pair]:
    """Draws questions about a scene: kinds in turn, within a kind first the answer and then the question.

    Drawing the answer first keeps frequent answers (`no`, `zero`) from being right too often.

    Args:
        scene: The scene.
        count: How many questions; fewer come out only if the scene has no more.
        rng: Source of chance.
    """
    left = {kind: sorted(set(questions(scene))) for kind, questions in KINDS.items()}
    asked: list[Pair] = []
    while len(asked) < count and any(left.values()):
        for kind in rng.sample(list(left), len(left)):
            if left[kind]:
                answer = rng.choice(sorted({answer for _, answer in left[kind]}))
                pair = rng.choice([pair for pair in left[kind] if pair[1] == answer])
                left[kind].remove(pair)
                asked.append(pair)
    return asked[:count]
