"""Which grid of tiles a picture is cut into, and the cut (NVLM's dynamic high resolution; rules as in Megatron-LM).

Shapes: T tiles of a picture, thumbnail included, H, W height and width in pixels, s side of a tile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from moextend_pl.contracts import UserError

CLOSEST, AREA, UNTAGGED = "closest", "area", "untagged"
FORM = re.compile(r"([1-9][0-9]?)(?::([a-z]+(?:,[a-z]+)*))?")
FULL_AREA, LARGE_ENOUGH = 0.6, 0.5
"""Shares of a picture's pixels, and of a grid's, by which Megatron-LM weighs grids."""

Grid = tuple[int, int]
"""Columns and rows."""


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut.

    Attributes:
        most: Most tiles of a picture, its thumbnail not counted; 0 leaves pictures as they are.
        rule: `closest` takes the grid with the nearest ratio of sides, as published; `area` weighs its pixels too.
        tagged: Whether each tile stands behind its tag.
    """

    most: int = 0
    rule: str = CLOSEST
    tagged: bool = True

    @classmethod
    def parse(cls, text: str | int | None) -> Tiling:
        """Reads `6`, `6:area`, `6:untagged` or `6:area,untagged`; None and an empty text cut nothing.

        Raises:
            UserError: If it is none of these.
        """
        if text is None or text == "":
            return cls()
        match = FORM.fullmatch(str(text))
        words = [] if match is None or match[2] is None else match[2].split(",")
        if match is None or len(set(words)) < len(words) or not {*words} <= {CLOSEST, AREA, UNTAGGED}:
            raise UserError(
                "Expected `encoder.features.tiles` as a number of tiles from 1 to 99, with `:area`, `:untagged` or "
                f"`:area,untagged` behind it where that is meant, got {text!r}."
            )
        return cls(int(match[1]), AREA if AREA in words else CLOSEST, UNTAGGED not in words)

    def count(self, width: int, height: int, side: int) -> int:
        """Returns T, how many squares a picture becomes; arguments as of `grid`."""
        columns, rows = self.grid(width, height, side)
        return columns * rows + (columns * rows > 1)

    def grid(self, width: int, height: int, side: int) -> Grid:
        """Returns the grid of a picture.

        Args:
            width: Of the picture in pixels.
            height: Of the picture in pixels.
            side: Of a tile in pixels.
        """
        choose = area_grid if self.rule == AREA else closest_grid
        return choose(width, height, side, max(self.most, 1))

    @property
    def most_squares(self) -> int:
        """The largest T."""
        return self.most + 1 if self.most > 1 else 1


@cache
def grids(most: int) -> tuple[Grid, ...]:
    """Returns every grid of at most so many tiles, those of few tiles first."""
    found = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def closest_grid(width: int, height: int, side: int, most: int) -> Grid:
    """Returns the grid whose ratio of sides is nearest to the picture's.

    Of grids that are equally near the larger one is taken if the picture has more than half of its pixels.

    Args:
        width: Of the picture in pixels.
        height: Of the picture in pixels.
        side: Of a tile in pixels.
        most: Most tiles.
    """
    best, least = (1, 1), float("inf")
    for columns, rows in grids(most):
        off = abs(width / height - columns / rows)
        large = width * height > LARGE_ENOUGH * side**2 * columns * rows
        if off < least or (off == least and large):
            best, least = (columns, rows), off
    return best


def area_grid(width: int, height: int, side: int, most: int) -> Grid:
    """Returns the grid that is best by ratio of sides times share of the picture's pixels; arguments as `closest_grid`.

    Above 0.6 of a picture's pixels a larger grid counts no more.
    """
    best, highest = (1, 1), float("-inf")
    for columns, rows in grids(most):
        ratio = columns / rows / (width / height)
        score = min(columns * rows * side**2 / (width * height), FULL_AREA) * min(ratio, 1 / ratio)
        if score > highest:
            best, highest = (columns, rows), score
    return best


def cut(whole_3HW: np.ndarray, grid: Grid) -> np.ndarray:
    """Cuts a picture of the size of its grid into (columns * rows, 3, s, s), row by row.

    Args:
        whole_3HW: H = rows * s, W = columns * s.
        grid: Columns and rows.
    """
    columns, rows = grid
    _, height, width = whole_3HW.shape
    squares = whole_3HW.reshape(3, rows, height // rows, columns, width // columns)
    return squares.transpose(1, 3, 0, 2, 4).reshape(-1, 3, height // rows, width // columns)
