"""Pictures as people have them: of every mode and kind, each with one shape of one colour, and a table about them."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 40), "green": (40, 170, 60), "blue": (30, 60, 220), "yellow": (235, 220, 40)}
GREY = {"gray": (128, 128, 128)}
KINDS = ("jpg", "cmyk", "grey", "alpha", "exif", "webp", "palette", "pixel")
QUESTION = "what color is the shape?"
TURNED = 6
"""EXIF orientation of a photo taken with the camera held upright."""


def draw(path: Path, kind: str, colour: str, dice: random.Random) -> Path:
    """Writes one picture and returns its path.

    Args:
        path: Without a suffix.
        kind: Out of `KINDS`.
        colour: Of the shape.
        dice: Decides its place and size, and those of the picture.
    """
    paint = {**COLOURS, **GREY}[colour]
    width, height, side = dice.randint(48, 96), dice.randint(48, 96), dice.randint(20, 30)
    left, top = dice.randint(2, width - 34), dice.randint(2, height - 34)
    box = (left, top, left + side, top + side)
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).rectangle(box, fill=paint)
    if kind == "grey":
        image = image.convert("L")
    if kind == "alpha":  # black under its clear parts
        image = Image.new("RGBA", image.size, (0, 0, 0, 0))
        ImageDraw.Draw(image).rectangle(box, fill=(*paint, 255))
    if kind == "palette":
        image = image.quantize(16)
    if kind == "pixel":
        image = Image.new("RGB", (1, 1), paint)
    suffix = {"jpg": ".jpg", "cmyk": ".jpg", "exif": ".jpg", "webp": ".webp"}.get(kind, ".png")
    exif = Image.Exif()
    exif[0x0112] = TURNED if kind == "exif" else 1
    (image.convert("CMYK") if kind == "cmyk" else image).save(path.with_suffix(suffix), exif=exif)
    return path.with_suffix(suffix)


def draw_pictures(folder: Path, count: int) -> None:
    """Fills a folder with pictures of all kinds and `answers.csv`."""
    folder.mkdir()
    dice = random.Random(0)
    rows = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        colour = "gray" if kind == "grey" else list(COLOURS)[number // 5 % len(COLOURS)]
        rows.append((draw(folder / f"{number:02d}_{kind}", kind, colour, dice).name, QUESTION, colour))
    with (folder / "answers.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("picture", "question", "answer"), *rows])
