"""How many features a tower makes of an image, found out before the tower is built.

Shapes: C channels, g side of the feature grid.
"""

from __future__ import annotations

from typing import Any

import timm
import torch

from moextend_pl.contracts import UserError
from moextend_pl.models.tower import make_tower, vision_config

TIMM_SIDE = 224


def patches_side(folder: str, side: int) -> int:
    """Returns the side of the grid of a transformers tower.

    Args:
        folder: Folder with its `config.json`.
        side: Side of its images in pixels.

    Raises:
        UserError: If the tower takes images of one other size only, as CLIP and SigLIP do.
    """
    config = vision_config(folder)
    own = getattr(config, "image_size", None)
    # The second look tells a tower that does not run without memory from one that does not take the side.
    if isinstance(own, int) and own != side and not _takes(folder, side) and _takes(folder, own):
        raise UserError(
            f"Expected `encoder.image_size` {own}, the side of the images that the tower in {folder} takes, got {side}."
        )
    return side // int(config.patch_size)


def _takes(folder: str, side: int) -> bool:
    with torch.device("meta"):
        tower = make_tower(folder, with_weights=False).eval()
        try:
            tower(pixel_values=torch.zeros(1, 3, side, side))
        except (ValueError, RuntimeError):
            return False
    return True


def timm_side(tower: Any, name: str, side: int) -> int:
    """Returns the side of the grid of a timm tower, which rounds as its layers do.

    Args:
        tower: On the meta device, in evaluation mode.
        name: Its name, for the error message.
        side: Side of its images in pixels.

    Raises:
        UserError: If the tower does not take the side, or its features are no grid (C, g, g).
    """
    try:
        features_1Cgg = tower(torch.zeros(1, 3, side, side, device="meta"))[-1]
    except AssertionError as error:  # as timm checks sizes
        raise UserError(f"{name} does not take images of `encoder.image_size` {side}: {error}") from error
    _, *sides = features_1Cgg.shape
    if sides != [tower.feature_info.channels()[-1], sides[-1], sides[-1]]:
        raise UserError(
            f"Expected a tower whose features are a square grid (channels, side, side), got {tuple(sides)} of {name}. "
            "Name another tower."
        )
    return int(sides[-1])


def own_side(folder: str) -> int:
    """Returns the side of the images that a transformers tower takes, in pixels.

    Raises:
        UserError: If its configuration does not say.
    """
    side = getattr(vision_config(folder), "image_size", None)
    side = side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side
    if not isinstance(side, int):
        raise UserError(
            f"Expected `encoder.image_size`, since {folder}/config.json says none. Set it in the stage file."
        )
    return side


def timm_own_side(name: str) -> int:
    """Returns the side of the images that a timm model was made for, in pixels; 224 where it does not say."""
    facts = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return TIMM_SIDE if facts is None else int(facts.input_size[-1])


def pooled_side(side: int, pool: int) -> int:
    """Returns the side of a grid after pooling.

    Args:
        side: Side before.
        pool: Side of the squares that are averaged.

    Raises:
        UserError: If no square fits.
    """
    if not 1 <= pool <= side:
        raise UserError(f"Expected `encoder.features.pool` in 1..{side}, the side of the tower's grid, got {pool}.")
    return side // pool
