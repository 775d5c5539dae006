"""Tiles of enlarged images, and the features put together again, against plain loops."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moextend_pl.models.multiscale import cut_tiles, encode_scales, join_tiles

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_tiles_are_row_major_parts_of_the_enlarged_image() -> None:
    large = F.interpolate(IMAGES, size=(18, 18), mode="bicubic", align_corners=False)
    tiles = cut_tiles(IMAGES, 3)
    assert tiles.shape == (18, 3, 6, 6)
    for image in range(2):
        for row in range(3):
            for column in range(3):
                part = large[image, :, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
                torch.testing.assert_close(tiles[9 * image + 3 * row + column], part)


def test_joined_tiles_are_the_enlarged_grid_averaged_over_areas() -> None:
    tiles = cut_tiles(IMAGES, 3)
    large = F.interpolate(IMAGES, size=(18, 18), mode="bicubic", align_corners=False)
    torch.testing.assert_close(join_tiles(tiles, 3), F.interpolate(large, size=(6, 6), mode="area"))


def test_half_precision_is_enlarged_in_fp32() -> None:
    exact = cut_tiles(IMAGES.bfloat16().float(), 2)
    assert cut_tiles(IMAGES.bfloat16(), 2).dtype == torch.bfloat16
    torch.testing.assert_close(cut_tiles(IMAGES.bfloat16(), 2).float(), exact.bfloat16().float())


def test_channels_of_all_scales_stand_side_by_side() -> None:
    got = encode_scales(lambda pixels: F.avg_pool2d(pixels, 2), IMAGES, [1, 2])
    assert got.shape == (2, 6, 3, 3)
    assert torch.equal(got[:, :3], F.avg_pool2d(IMAGES, 2))
