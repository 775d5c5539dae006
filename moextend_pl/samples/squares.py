"""Pictures of any shape -> the square that a tower takes: squashed, padded with the mean colour, or cropped.

Shapes: H, W height and width in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch.nn.functional import interpolate

from moextend_pl.contracts import UserError

SQUASH, PAD, CROP = "squash", "pad", "crop"
RESIZE = re.compile(rf"{PAD}|(?:{SQUASH}|{CROP})(?::([1-9][0-9]{{0,4}}))?")
BICUBIC = "bicubic"
RESAMPLE = ("nearest", "lanczos", "bilinear", BICUBIC, "box", "hamming")
"""Filters, in the order of Pillow's numbers."""
BY_TORCH = {BICUBIC: BICUBIC, "bilinear": "bilinear", "nearest": "nearest-exact"}
"""Filters that transformers leaves to torch, which has them in vector instructions, by their names there."""


def check_resize(resize: str, side: int) -> str:
    """Returns how pictures become square, if it can be done.

    Args:
        resize: `squash`, `pad`, `crop`, or `crop:N`, whose shorter side becomes N pixels before it is cropped, or
            `squash:N`, whose both sides do.
        side: Of the square in pixels.

    Raises:
        UserError: If it is something else, or N is smaller than the square.
    """
    match = RESIZE.fullmatch(resize)
    if match is None or int(match[1] or side) < side:
        raise UserError(
            f"Expected `encoder.features.resize` as `{SQUASH}`, `{PAD}`, `{CROP}`, `{CROP}:N` or `{SQUASH}:N` with N "
            f"of at least the image size {side}, got {resize!r}."
        )
    return resize


def check_resample(resample: str) -> str:
    """Returns the filter by which pictures change their size, if there is one of the name.

    Raises:
        UserError: If there is none.
    """
    if resample not in RESAMPLE:
        raise UserError(
            f"Expected `encoder.features.resample` as one of {', '.join(RESAMPLE)}, got {resample!r}. Correct it."
        )
    return resample


def to_square(
    image_HW3: np.ndarray, side: int, resize: str, mean: Sequence[float], resample: str = BICUBIC
) -> np.ndarray:
    """Returns (3, side, side) uint8.

    Bicubic and bilinear are torch's with antialiasing, which are Pillow's filters in vector instructions: values differ
    from Pillow's by less than 0.3 of 255 on average and by 2 at most. Padding and cropping place a picture as LLaVA's
    `expand2square` and transformers' CLIP processor do.

    Args:
        image_HW3: uint8.
        side: Of the square in pixels.
        resize: As for `check_resize`.
        mean: Colour of what is padded, in [0, 1].
        resample: As for `check_resample`.
    """
    height, width = image_HW3.shape[:2]
    tall = wide = side
    if resize == PAD and height != width:
        image_HW3 = _padded(image_HW3, mean)
    elif resize != PAD:
        tall = wide = int(resize.partition(":")[2] or side)
        if resize.startswith(CROP):  # the longer side is cut off to whole pixels, as transformers does
            tall, wide = (tall * length // min(height, width) for length in (height, width))
    image = resized(image_HW3, tall, wide, resample)
    top, left = (tall - side) // 2, (wide - side) // 2
    return image[:, top : top + side, left : left + side]


def resized(image_HW3: np.ndarray, tall: int, wide: int, resample: str) -> np.ndarray:
    """Returns (3, tall, wide) uint8; `resample` as for `check_resample`."""
    if resample in BY_TORCH:
        batch = torch.from_numpy(image_HW3).permute(2, 0, 1)[None]
        mode, smooth = BY_TORCH[resample], resample != "nearest"
        return interpolate(batch, (tall, wide), mode=mode, antialias=smooth)[0].numpy()
    image = Image.fromarray(image_HW3).resize((wide, tall), Resampling[resample.upper()])
    return np.asarray(image).transpose(2, 0, 1)


def _padded(image_HW3: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """Puts an image into the middle of a square (LLaVA, `mm_utils.expand2square`)."""
    height, width = image_HW3.shape[:2]
    longer = max(height, width)
    square = np.empty((longer, longer, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (longer - height) // 2, (longer - width) // 2
    square[top : top + height, left : left + width] = image_HW3
    return square
