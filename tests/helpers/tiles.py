"""Pictures of many shapes, and a language model that knows the tags of their tiles."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from helpers.tiny_world import SIDE, TinyWorld, colour_of
from PIL import Image

from datamodules.shards import Entry, conversation, write_shards
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.projector import Projector
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.samples.tiling.tags import tile_tags

SIZES = ((32, 32), (64, 32), (33, 90), (100, 64), (20, 150))
"""1, 2, 3, 6 and 6 tiles of 32 pixels, of six at most."""


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Returns a picture of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def as_file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Returns the bytes of a picture's file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_many_shapes(folder: Path, count: int = 12) -> str:
    """Writes a shard set of questions about pictures of many shapes, every third about two of them."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(count):
        files = tuple(as_file(photo(SIZES[(number + n) % 5], number + n)) for n in range(1 + (number % 3 == 0)))
        turn = ("<image>\n" * len(files) + "what is the color ?", colour_of(number))
        entries.append(Entry(f"s{number:02d}", conversation(turn), files))
    write_shards(entries, folder, 4)
    return str(folder)


def write_tagged_base(world: TinyWorld, folder: Path, most: int = 6) -> str:
    """Writes the tiny world's language model with a word for each tag."""
    language = world.language()
    language.tokenizer.add_tokens(tile_tags(most + 1, most))
    language.model.resize_token_embeddings(len(language.tokenizer), mean_resizing=False)
    language.save_pretrained(folder)
    return str(folder)


def tiled(
    world: TinyWorld, base: str, tiles: int | str = 6, looks: int = 0, thumbnail: bool = False, **language: Any
) -> MoExtend:
    """Returns MoExtend that sees tiles of 32 pixels, or looks at them before so manieth layer, not built yet."""
    return MoExtend(
        encoder=VisionEncoder(path=str(world.encoder), image_size=SIDE, features=FeatureSpec(tiles=tiles)),
        projector=Projector(kind="mlp2x_gelu", cross_attention=looks, thumbnail=thumbnail),
        language=MoELanguageModel(base=base, **language),
    )
