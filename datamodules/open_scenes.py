"""Shards of drawn things that people have a word for, with open questions and answers in sentences.

Two to four things of eight shapes and eight colours, each shape and each colour once in a picture, so that a question
can be answered only by looking: the most frequent answer to `What color is the star?` is right once in eight times.
Every picture and question is a pure function of a seed; no scene is in two splits.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

from datamodules.index import Shard
from datamodules.scene_questions import COLUMNS, ROWS, Pair
from datamodules.scenes import FINER, SIDE, split_of, varied
from datamodules.sets import write_sets
from datamodules.shards import SAMPLES_PER_SHARD, Entry, conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_MARK

IMAGES, MIN_IMAGES, MAX_IMAGES = 6000, 20, 100_000
"""Pictures of all splits together: usual, fewest (every split has one) and most."""
ROWS_OF_PICTURE = 2
"""Training conversations of a picture; elsewhere each question stands alone."""
THINGS = (2, 4)
"""Fewest and most things of a scene."""
DESCRIBE = "Describe the picture."

PAINTS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 50),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "purple": (125, 40, 170),
    "pink": (250, 150, 200),
    "black": (25, 25, 25),
}
NUMBERS = ("zero", "one", "two", "three", "four")
RADIUS = (10.0, 13.0)
"""Half the side of a thing's box, in pixels: smallest and largest."""

Place = tuple[str, str]
PLACES: tuple[Place, ...] = tuple(product(ROWS, COLUMNS))


def _star(points: int = 5) -> list[tuple[float, float]]:
    turns = [(math.pi * (step / points - 0.5), 1.0 if step % 2 == 0 else 0.42) for step in range(2 * points)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle, radius in turns]


def _heart(steps: int = 40) -> list[tuple[float, float]]:
    angles = [2 * math.pi * step / steps for step in range(steps)]
    curve = [(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) / 16) for t in angles]
    return [(x, y + 0.1) for x, y in curve]


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (0.95, 0.85), (-0.95, 0.85)],
    "diamond": [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (x * sx, y * sy)
        for sx, sy, arm in ((1, -1, 0), (1, 1, 1), (-1, 1, 0), (-1, -1, 1))
        for x, y in (((0.3, 1.0), (0.3, 0.3), (1.0, 0.3)) if arm == 0 else ((1.0, 0.3), (0.3, 0.3), (0.3, 1.0)))
    ],
}
"""Corners of a shape in the box from -1 to 1; a circle and a ring have none."""
SHAPES = ("circle", "ring", *OUTLINES)


@dataclass(frozen=True)
class Thing:
    """One drawn thing and where it is.

    Attributes:
        colour: Out of `PAINTS`.
        shape: Out of `SHAPES`.
        place: Row and column.
    """

    colour: str
    shape: str
    place: Place

    @property
    def name(self) -> str:
        """With its article, as `an orange star`."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"

    @property
    def where(self) -> str:
        """As `at the top left`."""
        return f"at the {' '.join(self.place)}"


Scene = tuple[Thing, ...]
"""Things row by row."""


@dataclass(frozen=True)
class Picture:
    """A scene with all that is asked and drawn.

    Attributes:
        key: Its number, with leading zeros.
        scene: What it shows.
        seed: Source of all that the scene leaves to chance.
    """

    key: str
    scene: Scene
    seed: str

    def chance(self, purpose: str) -> random.Random:
        """Returns a source of chance of its own for each purpose."""
        return random.Random(f"{purpose} {self.seed}")


def draw_scene(rng: random.Random) -> Scene:
    """Draws a scene: as many places as things, a colour and a shape for each, none twice."""
    count = rng.randint(*THINGS)
    kinds = zip(rng.sample(list(PAINTS), count), rng.sample(SHAPES, count), strict=True)
    places = sorted(rng.sample(PLACES, count), key=PLACES.index)
    return tuple(Thing(colour, shape, place) for (colour, shape), place in zip(kinds, places, strict=True))


def pictures(count: int, seed: int) -> Iterator[Picture]:
    """Yields pictures whose scenes all differ; another seed gives others."""
    rng = random.Random(f"open scenes {seed}")
    seen: set[Scene] = set()
    while len(seen) < count:
        scene = draw_scene(rng)
        if scene not in seen:
            key = f"{len(seen):06d}"
            seen.add(scene)
            yield Picture(key, scene, f"{seed} {key}")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


KINDS: tuple[Callable[[Thing], Pair], ...] = (
    lambda t: (f"What color is the {t.shape}?", _sentence(t.colour)),
    lambda t: (f"What is the {t.colour} shape?", _sentence(f"a {t.shape}")),
    lambda t: (f"What is {t.where}?", _sentence(t.name)),
    lambda t: (f"Where is the {t.shape}?", _sentence(t.where)),
)
"""Kinds of questions about one thing."""
assert len(KINDS) >= THINGS[1]


def count(scene: Scene) -> Pair:
    """Asks how many things there are."""
    return "How many shapes are there?", _sentence(NUMBERS[len(scene)])


def ask(picture: Picture) -> list[Pair]:
    """Draws a question of every kind about a picture, in any order."""
    rng = picture.chance("ask")
    found = [*(kind(rng.choice(picture.scene)) for kind in KINDS), count(picture.scene)]
    return rng.sample(found, len(found))


def converse(picture: Picture) -> list[list[Pair]]:
    """Draws conversations about a picture; none of their answers can be read off another one of the same conversation.

    Each thing is asked about once in a conversation, in another way each time, and the number of things before them.
    """
    rng = picture.chance("converse")
    things, kinds = rng.sample(picture.scene, len(picture.scene)), rng.sample(KINDS, len(KINDS))
    turned = [kinds[row:] + kinds[:row] for row in range(ROWS_OF_PICTURE)]
    rows = [[kind(thing) for kind, thing in zip(order, things, strict=False)] for order in turned]
    return [[count(picture.scene), *rows[0]], *(rng.sample(row, len(row)) for row in rows[1:])]


def caption(scene: Scene) -> str:
    """Tells of a scene in one sentence, thing by thing."""
    return _sentence(", ".join(f"{thing.name} {thing.where}" for thing in scene))


def paint(picture: Picture) -> bytes:
    """Draws a picture as PNG; place, size and paint vary a little."""
    rng = picture.chance("paint")
    image = Image.new("RGB", (SIDE * FINER, SIDE * FINER), varied((225, 225, 225), rng))
    canvas = ImageDraw.Draw(image)
    half = SIDE / 2
    for thing in picture.scene:
        radius = rng.uniform(*RADIUS)
        room = half / 2 - radius - 1
        x = half * (0.5 + (thing.place[1] == "right")) + rng.uniform(-room, room)
        y = half * (0.5 + (thing.place[0] == "bottom")) + rng.uniform(-room, room)
        _draw(canvas, thing.shape, (x * FINER, y * FINER), radius * FINER, varied(PAINTS[thing.colour], rng))
    stream = io.BytesIO()
    image.reduce(FINER).save(stream, "PNG")
    return stream.getvalue()


def _draw(
    canvas: ImageDraw.ImageDraw, shape: str, middle: tuple[float, float], radius: float, colour: tuple[int, int, int]
) -> None:
    x, y = middle
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=round(0.35 * radius))
    else:
        canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[shape]], fill=colour)


def _entries(split: str, shown: list[Picture]) -> dict[str, list[Entry]]:
    sets: dict[str, list[Entry]] = {"captions": [], "vqa": [], "text": []}
    for picture in shown:
        image, told = (paint(picture),), caption(picture.scene)
        sets["captions"].append(Entry(picture.key, conversation((f"{IMAGE_MARK}\n{DESCRIBE}", told)), image))
        each = ask(picture)
        # What is measured is one question at a time, of which a picture that is not trained on has each kind once.
        for number, row in enumerate(converse(picture) if split == "train" else [[pair] for pair in each]):
            (first, answer), *others = row
            turns = conversation((f"{IMAGE_MARK}\n{first}", answer), *others)
            sets["vqa"].append(Entry(f"{picture.key}-{number}", turns, image))
        sets["text"].append(Entry(picture.key, conversation(*((f"{told} {q}", a) for q, a in each))))
    return sets


def build_open_scenes(
    out: Path, images: int = IMAGES, seed: int = 0, samples_per_shard: int = SAMPLES_PER_SHARD
) -> dict[str, list[Shard]]:
    """Builds the three shard sets, each with `train`, `val` and `test`, and a tokenizer of all words; see `write_sets`.

    Raises:
        UserError: If the number of images is out of range, or the folder holds something else.
    """
    if not MIN_IMAGES <= images <= MAX_IMAGES:
        raise UserError(f"Expected `--images` from {MIN_IMAGES} to {MAX_IMAGES}, got {images}.")
    drawn = list(pictures(images, seed))

    def entries_of(split: str) -> dict[str, list[Entry]]:
        return _entries(split, [picture for number, picture in enumerate(drawn) if split_of(number) == split])

    return write_sets(out, entries_of, samples_per_shard, (*PAINTS, *SHAPES, *NUMBERS))
