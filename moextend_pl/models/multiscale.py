"""Features of one image at several scales, on the same number of tokens (S2, arXiv 2403.13043).

Shapes: I images, s a scale, H = W side of an image and of a tile, C channels, g side of the feature grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moextend_pl.contracts import UserError


def checked_scales(scales: Sequence[int]) -> list[int]:
    """Returns the scales.

    Raises:
        UserError: If one is no whole number from 1.
    """
    if any(scale < 1 for scale in scales):
        raise UserError(f"Expected `encoder.features.scales` of whole numbers from 1, got {list(scales)}.")
    return list(scales)


def cut_tiles(pixels_I3HW: Tensor, scale: int) -> Tensor:
    """Enlarges images and cuts them into tiles of their former size.

    Args:
        pixels_I3HW: Normalised images; enlarging them adds no detail.
        scale: Factor s of the enlargement.

    Returns:
        (I * s * s, 3, H, W), the tiles of an image one after another, row by row.
    """
    if scale == 1:
        return pixels_I3HW
    images, channels, height, width = pixels_I3HW.shape
    # In fp32: bicubic weights lose too much in half precision.
    large = F.interpolate(pixels_I3HW.float(), scale_factor=scale, mode="bicubic").to(pixels_I3HW.dtype)
    tiles = large.reshape(images, channels, scale, height, scale, width).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(images * scale**2, channels, height, width)


def join_tiles(grids_TCgg: Tensor, scale: int) -> Tensor:
    """Puts the feature grids of tiles together and averages them to the size of one.

    Args:
        grids_TCgg: Grids in the order of `cut_tiles`.
        scale: Factor s.

    Returns:
        (I, C, g, g).
    """
    if scale == 1:
        return grids_TCgg
    tiles, channels, side, _ = grids_TCgg.shape
    squares = grids_TCgg.reshape(tiles // scale**2, scale, scale, channels, side, side)
    large = squares.permute(0, 3, 1, 4, 2, 5).reshape(tiles // scale**2, channels, scale * side, scale * side)
    return F.avg_pool2d(large, scale)


def encode_scales(encode: Callable[[Tensor], Tensor], pixels_I3HW: Tensor, scales: Sequence[int]) -> Tensor:
    """Encodes images at several scales.

    Args:
        encode: From images (., 3, H, W) to grids (., C, g, g).
        pixels_I3HW: Normalised images.
        scales: Factors, for example 1 and 3.

    Returns:
        (I, C * len(scales), g, g), the channels of the first scale first.
    """
    return torch.cat([join_tiles(encode(cut_tiles(pixels_I3HW, scale)), scale) for scale in scales], dim=1)
