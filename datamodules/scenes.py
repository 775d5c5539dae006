"""Shards of drawn scenes: two or three things of several shapes, colours and sizes, with one-word answers.

A harder relative of easy-VQA (`datamodules/easy_vqa.py`) with the same sets, splits and picture size. Every
picture, question and sentence is a pure function of a seed; no scene is in two splits.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from datamodules.index import Shard
from datamodules.scene_questions import COLOURS, NUMBERS, PLACES, PLURALS, SHAPES, SIZES, Pair, Scene, Thing, ask
from datamodules.sets import DESCRIBE, SETS, write_sets
from datamodules.shards import SAMPLES_PER_SHARD, Entry, conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_MARK

IMAGES, MIN_IMAGES, MAX_IMAGES = 5000, 20, 20_000
"""Pictures of all splits together: usual, fewest (every split has one) and most (there are 58,752 scenes)."""
QUESTIONS = 10
"""Questions of a picture."""
THINGS = (2, 3)
"""Fewest and most things of a scene."""
REPEAT = 0.4
"""Chance that a thing takes over the colour, or the shape, of an earlier one, so that there is something to count."""

SIDE, FINER = 64, 4
"""Side of a picture in pixels; it is drawn this many times finer and then reduced, for smooth edges."""
RADIUS = {"small": (5.0, 6.5), "large": (9.5, 12.0)}
"""Half the side of a thing's box, in pixels: smallest and largest."""
PAINTS = {
    "blue": (40, 70, 220),
    "green": (40, 160, 60),
    "red": (215, 40, 40),
    "yellow": (235, 205, 50),
}
JITTER = 18
"""Largest change of a paint or of the background, by channel, in steps of 255."""

SENTENCES = (
    "{row} {column}: {name}.",
    "at the {row} {column}: {name}.",
    "look at the {row} {column}: {name}.",
)
"""Ways to tell of one thing, of different lengths, so that nothing can be learned from a word's place."""


@dataclass(frozen=True)
class Picture:
    """A scene with all that is asked and drawn.

    Attributes:
        key: Its number, with leading zeros.
        scene: What it shows.
        questions: Pairs of question and answer.
        seed: Source of all that the scene leaves to chance.
    """

    key: str
    scene: Scene
    questions: tuple[Pair, ...]
    seed: str


def draw_scene(rng: random.Random) -> Scene:
    """Draws a scene of two or three things."""
    things: list[Thing] = []
    for _ in range(rng.randint(*THINGS)):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        if things and rng.random() < REPEAT:
            colour = rng.choice(things).colour
        if things and rng.random() < REPEAT:
            shape = rng.choice(things).shape
        things.append(Thing(rng.choice(SIZES), colour, shape))
    places: list[Thing | None] = [*things, *[None] * (len(PLACES) - len(things))]
    rng.shuffle(places)
    return Scene(tuple(places))


def pictures(count: int, seed: int) -> Iterator[Picture]:
    """Yields pictures whose scenes all differ; another seed gives others."""
    rng = random.Random(f"scenes {seed}")
    seen: set[Scene] = set()
    while len(seen) < count:
        scene = draw_scene(rng)
        if scene not in seen:
            key = f"{len(seen):06d}"
            seen.add(scene)
            own = f"{seed} {key}"
            yield Picture(key, scene, tuple(ask(scene, QUESTIONS, random.Random(f"ask {own}"))), own)


def split_of(number: int) -> str:
    """Returns the split of the n-th picture: 1 of 20 is for validation, 4 of 20 are for testing."""
    return "val" if number % 20 == 0 else "test" if number % 5 == 1 else "train"


def paint(picture: Picture) -> bytes:
    """Draws a picture as PNG; place, size and paint vary within what their words allow."""
    rng = random.Random(f"paint {picture.seed}")
    grey = 255 - JITTER + rng.randint(-JITTER, JITTER)
    image = Image.new("RGB", (SIDE * FINER, SIDE * FINER), varied((grey, grey, grey), rng))
    canvas = ImageDraw.Draw(image)
    half = SIDE / 2
    for (row, column), thing in picture.scene.placed():
        radius = rng.uniform(*RADIUS[thing.size])
        room = half / 2 - radius - 1
        x = half / 2 + half * (column == "right") + rng.uniform(-room, room)
        y = half / 2 + half * (row == "bottom") + rng.uniform(-room, room)
        _draw(canvas, thing.shape, (x * FINER, y * FINER, radius * FINER), varied(PAINTS[thing.colour], rng))
    stream = io.BytesIO()
    image.reduce(FINER).save(stream, "PNG")
    return stream.getvalue()


def varied(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """Returns a colour within `JITTER` of another."""
    red, green, blue = (min(max(channel + rng.randint(-JITTER, JITTER), 0), 255) for channel in colour)
    return red, green, blue


def _draw(
    canvas: ImageDraw.ImageDraw, shape: str, place: tuple[float, float, float], colour: tuple[int, int, int]
) -> None:
    """Draws one shape into the box around (x, y) with half side r."""
    x, y, r = place
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour)
    else:
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)


def caption(scene: Scene) -> str:
    """Lists what there is, row by row, as `top left small red circle, bottom right large blue square`."""
    return ", ".join(f"{row} {column} {thing.name}" for (row, column), thing in scene.placed())


def describe(scene: Scene, rng: random.Random) -> str:
    """Tells of a scene row by row, in one sentence for each thing."""
    return " ".join(
        rng.choice(SENTENCES).format(row=row, column=column, name=thing.name) for (row, column), thing in scene.placed()
    )


def entries(shown: Iterable[Picture]) -> dict[str, list[Entry]]:
    """Returns the samples of each set for the pictures of one split."""
    sets: dict[str, list[Entry]] = {name: [] for name in SETS}
    for picture in shown:
        image = (paint(picture),)
        summary = caption(picture.scene)
        sets["captions"].append(Entry(picture.key, conversation((f"{IMAGE_MARK}\n{DESCRIBE}", summary)), image))
        (first, answer), *others = picture.questions
        turns = conversation((f"{IMAGE_MARK}\n{first}", answer), *others)
        sets["vqa"].append(Entry(picture.key, turns, image))
        rng = random.Random(f"tell {picture.seed}")
        texts = [(f"{describe(picture.scene, rng)} {question}", reply) for question, reply in picture.questions]
        texts.append((f"{describe(picture.scene, rng)} {DESCRIBE}", summary))
        sets["text"].append(Entry(picture.key, conversation(*texts)))
    return sets


def build_scenes(
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
        return entries(picture for number, picture in enumerate(drawn) if split_of(number) == split)

    # A few pictures need not show every word; the tokenizer knows them all, whatever the number of pictures.
    words = (*COLOURS, *SHAPES, *SIZES, *NUMBERS, *PLURALS.values(), "yes", "no")
    return write_sets(out, entries_of, samples_per_shard, words)
