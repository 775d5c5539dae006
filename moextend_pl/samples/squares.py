"""Pictures of any shape -> the square that a tower takes: squashed, padded with the mean colour, or cropped.

Shapes: H, W height and width in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from moextend_pl.contracts import UserError

SQUASH, PAD, CROP = "squash", "pad", "crop"
RESIZE = re.compile(rf"{SQUASH}|{PAD}|{CROP}(?::([1-9][0-9]{{0,4}}))?")


def check_resize(resize: str, side: int) -> str:
    """Returns how pictures become square, if it can be done.

    Args:
        resize: `squash`, `pad`, `crop`, or `crop:N`, whose shorter side becomes N pixels before it is cropped.
        side: Of the square in pixels.

    Raises:
        UserError: If it is something else, or N is smaller than the square.
    """
    match = RESIZE.fullmatch(resize)
    if match is None or int(match[1] or side) < side:
        raise UserError(
            f"Expected `encoder.features.resize` as `{SQUASH}`, `{PAD}`, `{CROP}`, or `{CROP}:N` with N of at least "
            f"the image size {side}, got {resize!r}."
        )
    return resize


def own_resize(facts: Mapping[str, Any], side: int) -> str:
    """Returns how the data of a transformers tower were made square.

    Args:
        facts: Of its `preprocessor_config.json`; without a word about shapes pictures are squashed.
        side: Of the square in pixels.
    """
    if facts.get("do_pad") and str(facts.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
        return PAD
    size, crop = facts.get("size"), facts.get("crop_size")
    shorter = size.get("shortest_edge") if isinstance(size, Mapping) else size
    crop = crop.get("height") if isinstance(crop, Mapping) else crop
    if not facts.get("do_center_crop") or not isinstance(shorter, int) or not isinstance(crop, int):
        return SQUASH
    # Of a square of another side the same part is seen.
    return CROP if shorter <= crop else f"{CROP}:{round(side * shorter / crop)}"


def to_square(image_HW3: np.ndarray, side: int, resize: str, mean: Sequence[float]) -> np.ndarray:
    """Returns (3, side, side) uint8.

    By torch's bicubic filter with antialiasing, which is Pillow's filter in vector instructions: values differ from
    Pillow's by less than 0.3 of 255 on average and by 2 at most. Padding and cropping place a picture as LLaVA's
    `expand2square` and transformers' CLIP processor do.

    Args:
        image_HW3: uint8.
        side: Of the square in pixels.
        resize: As for `check_resize`.
        mean: Colour of what is padded, in [0, 1].
    """
    height, width = image_HW3.shape[:2]
    tall = wide = side
    if resize == PAD and height != width:
        image_HW3 = _padded(image_HW3, mean)
    elif resize.startswith(CROP):
        # The longer side is cut off to whole pixels, as transformers does.
        shorter = int(resize.partition(":")[2] or side)
        tall, wide = (shorter * length // min(height, width) for length in (height, width))
    batch = torch.from_numpy(image_HW3).permute(2, 0, 1)[None]
    image = interpolate(batch, (tall, wide), mode="bicubic", antialias=True)[0].numpy()
    top, left = (tall - side) // 2, (wide - side) // 2
    return image[:, top : top + side, left : left + side]


def _padded(image_HW3: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """Puts an image into the middle of a square (LLaVA, `mm_utils.expand2square`)."""
    height, width = image_HW3.shape[:2]
    longer = max(height, width)
    square = np.empty((longer, longer, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (longer - height) // 2, (longer - width) // 2
    square[top : top + height, left : left + width] = image_HW3
    return square
