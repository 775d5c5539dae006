"""Pictures become square as transformers' own image processors, LLaVA's code and Pillow make them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.samples.pixels import PixelTransform
from moextend_pl.samples.squares import check_resize

SIDE = 56
SIZES = [(64, 48), (48, 64), (200, 30), (33, 56), (56, 56), (20, 9), (61, 90)]


def photo(size):
    """A picture of large shapes with noise on it, as a photograph has."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)).astype(int)
    grain = np.random.default_rng(1).integers(-20, 21, (height, width, 3))
    return Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))


def ours(image, processor, resize):
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    spec = SampleSpec(None, 0, 0, image_size=SIDE, image_mean=mean, image_std=std, resize=resize)
    return PixelTransform(spec)(image)


def close(found, processor, image):
    """Compares in levels of 255, before normalisation."""
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert found.shape == expected.shape
    levels = ((found - expected) * torch.tensor(processor.image_std).reshape(3, 1, 1) * 255).abs()
    assert levels.max() <= 1.01
    assert levels.mean() < 0.1


def clip(shorter=SIDE):
    return CLIPImageProcessor(size={"shortest_edge": shorter}, crop_size={"height": SIDE, "width": SIDE})


@pytest.mark.parametrize("size", SIZES)
def test_pictures_become_square_as_the_processors_of_clip_and_siglip_make_them(size):
    image = photo(size)
    close(ours(image, clip(), "crop"), clip(), image)
    close(ours(image, clip(64), "crop:64"), clip(64), image)
    siglip = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    close(ours(image, siglip, "squash"), siglip, image)


def expand2square(pil_img, background_color):
    """LLaVA's own: https://github.com/haotian-liu/LLaVA/blob/main/llava/mm_utils.py"""
    width, height = pil_img.size
    if width == height:
        return pil_img
    if width > height:
        result = Image.new(pil_img.mode, (width, width), background_color)
        result.paste(pil_img, (0, (width - height) // 2))
        return result
    result = Image.new(pil_img.mode, (height, height), background_color)
    result.paste(pil_img, ((height - width) // 2, 0))
    return result


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_padded_as_llava_pads_them(size):
    image, processor = photo(size), clip()
    square = expand2square(image, tuple(int(x * 255) for x in processor.image_mean))
    close(ours(image, processor, "pad"), processor, square)
    # Before CLIP's filter smears the border, the padding is exactly the mean, which becomes nothing.
    if size == (200, 30):
        assert ours(image, processor, "pad")[:, :8].abs().max() < 0.02


@pytest.mark.parametrize("wrong", ["stretch", "crop:", "crop:40", "crop:0x40", "pad:60", "squash:40", ""])
def test_another_word_is_told_with_those_that_there_are(wrong):
    with pytest.raises(UserError, match=r"as `squash`, `pad`, .* or `squash:N` with N of at least .* 56, got"):
        check_resize(wrong, SIDE)
