"""Bytes of an image -> pixels a tower takes; the only place where images are decoded."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from moextend_pl.contracts import UserError
from moextend_pl.samples.squares import check_resample, check_resize, resized, to_square
from moextend_pl.samples.tiling.tiles import Tiling, cut
from moextend_pl.samples.turns import IMAGE_FORMATS

if TYPE_CHECKING:
    from moextend_pl.contracts import SampleSpec

MAX_PIXELS = 64_000_000
"""Largest image that is decoded; below the limit at which Pillow itself warns of a bomb."""

BACKGROUND = "white"
"""What is seen through clear pixels."""

ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)
"""EXIF's tag, and those of its values that exchange width and height."""

DECODERS = tuple(dict.fromkeys(IMAGE_FORMATS.values()))


def content_name(data: bytes) -> str:
    """Names what features are kept of by its content: the same file has the same name in whatever sample it lies."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def open_image(data: bytes, origin: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image without decoding its pixels; only PNG, JPEG and WEBP are tried.

    Raises:
        UserError: If the bytes are of another format, or the image is too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=DECODERS)
    except Image.DecompressionBombError as error:  # Pillow's own limit lies far above ours
        raise UserError(f"{origin}: expected at most {max_pixels} pixels, Pillow says: {error}.") from error
    except Exception as error:  # Pillow's plugins raise whatever they like on damaged headers
        # Pillow's own sentence would name the object that it reads from.
        found = "it is none of them" if isinstance(error, UnidentifiedImageError) else error
        kinds = ", ".join(DECODERS)
        raise UserError(
            f"{origin}: expected an image as {kinds}, Pillow says: {found}. Convert it to PNG, JPEG or WebP."
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise UserError(f"{origin}: expected at most {max_pixels} pixels, got {width} x {height}. Shrink the image.")
    return image


def decode_image(data: bytes, origin: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image to RGB, see `to_rgb`; an animation gives its first frame.

    Raises:
        UserError: As `open_image`, and if the pixels are cut short or damaged.
    """
    return decoded(open_image(data, origin, max_pixels), origin)


def decoded(image: Image.Image, origin: str) -> Image.Image:
    """Returns an image, perhaps opened but not yet read, as RGB; see `to_rgb`.

    Raises:
        UserError: If its pixels are cut short or damaged.
    """
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:  # as above, now for damaged pixels
        raise UserError(f"{origin}: the image is cut short or damaged, Pillow says: {error}.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image as RGB as a viewer shows it: upright by its EXIF orientation, what is clear on white.

    16-bit greys keep their upper 8 bits, where Pillow would make all but black white.
    """
    image = upright(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        # Without a ground the colours under clear pixels would show, which no one who drew them saw.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF orientation says, which it loses; as it is where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever a damaged EXIF block makes Pillow raise: the pixels are there all the same
        return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height of an image as `upright` turns it; of one that was opened only, nothing is decoded."""
    try:
        lies = image.getexif().get(ORIENTATION) in LYING
    except Exception:  # as above
        lies = False
    return image.size[::-1] if lies else image.size


class PixelTransform:
    """RGB image -> (3, H, W) float32, made the square that a model asks for and normalised; (T, 3, H, W) if it is cut.

    Args:
        spec: What the model asks of its data; pixel values become `(x / 255 - mean) / std`.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.side, self.resize, self.mean = spec.image_size, check_resize(spec.resize, spec.image_size), spec.image_mean
        self.resample, self.tiling = check_resample(spec.resample), Tiling.parse(spec.tiles)
        std = np.array(spec.image_std, dtype=np.float32)
        # One multiplication and one addition, folded, since this runs for every image.
        self.scale = (1.0 / (255.0 * std)).reshape(3, 1, 1)
        self.shift = (-np.array(spec.image_mean, dtype=np.float32) / std).reshape(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns the pixel values of one image."""
        return self.normalised(self.levels(image))

    def squares(self, image: Image.Image) -> int:
        """Returns how many squares an image becomes; it may be opened only."""
        return self.tiling.count(*upright_size(image), self.side) if self.tiling.most else 1

    def levels(self, image: Image.Image) -> np.ndarray:
        """Returns uint8: (3, side, side), or where images are cut (T, 3, side, side), tiles row by row, then the whole.

        The whole is the square that the image would become uncut; an image of one tile has nothing else.
        """
        whole = self.square(image)
        if not self.tiling.most:
            return whole
        columns, rows = self.tiling.grid(*image.size, self.side)
        if columns * rows == 1:
            return whole[None]
        large = resized(np.array(image), rows * self.side, columns * self.side, self.resample)
        return np.concatenate([cut(large, (columns, rows)), whole[None]])

    def normalised(self, levels: np.ndarray) -> torch.Tensor:
        """Returns the pixel values of what `levels` returned, which stays as it is."""
        pixels = levels.astype(np.float32, order="C")
        pixels *= self.scale
        pixels += self.shift
        return torch.from_numpy(pixels)

    def square(self, image: Image.Image) -> np.ndarray:
        """Returns (3, side, side) uint8."""
        if image.size == (self.side, self.side) and ":" not in self.resize:
            # Pillow takes the channels of each line apart faster than numpy turns an image.
            lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)
            return lines.reshape(self.side, 3, self.side).transpose(1, 0, 2)
        return to_square(np.array(image), self.side, self.resize, self.mean, self.resample)
