from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.samples.pixels import PixelTransform, decode_image, to_rgb


def save(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(size=(6, 5)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_lossless_kinds_give_back_their_pixels():
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(np.asarray(decode_image(save(noise(), kind, **options), "x")), np.asarray(noise()))
    assert decode_image(save(noise(), "JPEG"), "x").size == (6, 5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = decode_image(save(noise().convert(mode), "JPEG" if mode == "CMYK" else "PNG"), "x")
    assert (image.mode, image.size) == ("RGB", (6, 5))


def test_sixteen_bit_greys_keep_their_upper_bits():
    greys = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    pixels = np.asarray(decode_image(save(Image.fromarray(greys)), "x"))
    assert pixels[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [255] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_photo_is_turned_upright_as_pillow_turns_it(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = save(noise(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(data, "x")), np.asarray(expected))
    assert decode_image(data, "x").size == ((5, 6) if orientation > 4 else (6, 5))
    # What is decoded may be given on as a picture of the user's.
    assert np.array_equal(np.asarray(to_rgb(decode_image(data, "x"))), np.asarray(expected))


@pytest.mark.parametrize("exif", [b"Exif\x00\x00not a block", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"])
def test_a_damaged_exif_block_leaves_a_photo_as_it_is(exif):
    assert decode_image(save(noise(), "JPEG", exif=exif), "x").size == (6, 5)


def test_an_orientation_that_does_not_exist_leaves_a_photo_as_it_is():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    assert np.array_equal(np.asarray(decode_image(save(noise(), exif=exif), "x")), np.asarray(noise()))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_clear_pixels_show_white_and_half_clear_ones_a_mixture(mode):
    image = Image.new("RGBA", (3, 1))
    for place, alpha in enumerate((0, 128, 255)):
        image.putpixel((place, 0), (10, 10, 10, alpha))
    pixels = np.asarray(decode_image(save(image.convert(mode)), "x"))[0, :, 0]
    assert pixels.tolist() == [255, round(255 - 128 / 255 * 245), 10]


def test_a_transparent_colour_of_a_palette_or_of_an_image_shows_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    key = Image.new("RGB", (2, 1), (200, 0, 0))
    key.putpixel((1, 0), (0, 0, 200))
    for data in (save(palette, transparency=0), save(key, transparency=(200, 0, 0))):
        assert np.asarray(decode_image(data, "x"))[0].tolist() == [[255, 255, 255], [0, 0, 200]]


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind):
    with pytest.raises(UserError, match=r"shard: key.*PNG, JPEG, WEBP.*Convert it to PNG, JPEG or WebP") as caught:
        decode_image(save(noise(), kind), "shard: key")
    assert "BytesIO" not in str(caught.value)


def test_damaged_images_are_refused_wherever_the_damage_is():
    data = save(noise((40, 40)))
    for cut in (0, 4, 20, 40, len(data) // 2, len(data) - 60):
        with pytest.raises(UserError, match="key"):
            decode_image(data[:cut], "key")
    jpeg = save(noise((40, 40)), "JPEG")
    with pytest.raises(UserError, match="key"):
        decode_image(jpeg[: len(jpeg) // 2], "key")


def test_a_large_image_is_refused_before_its_pixels_are_decoded(monkeypatch):
    data = save(noise((40, 40)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="at most 1599 pixels, got 40 x 40"):
        decode_image(data, "key", max_pixels=1599)


def test_pixels_are_normalised_channel_by_channel(words):
    spec = SampleSpec(words, 99, 4, image_size=6, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    image = noise((6, 6))
    found = PixelTransform(spec)(image)
    assert (found.dtype, found.shape) == (torch.float32, (3, 6, 6))
    for y in range(6):
        for x in range(6):
            red, green, blue = (value / 255 for value in image.getpixel((x, y)))
            expected = torch.tensor([(red - 0.1) / 0.5, (green - 0.2) / 0.6, (blue - 0.3) / 0.7])
            torch.testing.assert_close(found[:, y, x], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (1000, 90), (336, 200), (120, 80), (337, 335), (1, 1), (2, 400)]
)
def test_other_sizes_are_resized_to_the_square_as_pillow_does(words, size):
    spec = SampleSpec(words, 99, 4, image_size=336, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    # A picture of large shapes with noise on it, as a photograph has.
    image = noise((max(size[0] // 16, 1), max(size[1] // 16, 1))).resize(size, Image.Resampling.BICUBIC)
    grain = np.random.default_rng(1).integers(-20, 21, (size[1], size[0], 3))
    image = Image.fromarray((np.asarray(image).astype(int) + grain).clip(0, 255).astype(np.uint8))
    expected = np.asarray(image.resize((336, 336), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    levels = np.abs(PixelTransform(spec)(image).numpy() * 255 - expected).round()
    assert levels.max() <= 2
    assert levels.mean() < 0.3


def test_the_square_itself_is_not_touched(words):
    spec = SampleSpec(words, 99, 4, image_size=8, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    found = PixelTransform(spec)(noise((8, 8))).numpy() * 255
    np.testing.assert_allclose(found, np.asarray(noise((8, 8))).transpose(2, 0, 1), atol=1e-4)
