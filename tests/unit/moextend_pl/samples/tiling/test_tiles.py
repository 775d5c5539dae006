"""Pictures become tiles as Pillow cuts them, and stand in ids with the tags of NVLM."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiles import SIZES, as_file, photo
from PIL import Image
from transformers import PreTrainedTokenizerFast

from datamodules.word_tokenizer import word_tokenizer
from moextend_pl.contracts import IGNORE_INDEX, SampleSpec, UserError
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import PixelTransform, decode_image, open_image
from moextend_pl.samples.tiling.tags import tile_tags
from moextend_pl.samples.tiling.tiles import Tiling
from moextend_pl.samples.turns import Turn

SIDE, PLACES = 32, 4
TURNS = (Turn("<image>\nwhat is left ?\n<image>", "red"), Turn("and <image> here ?", "blue"))


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer([" ".join([*tile_tags(7, 6), *(f"{turn.human} {turn.gpt}" for turn in TURNS)])])


@pytest.fixture(scope="module")
def spec(words: PreTrainedTokenizerFast) -> SampleSpec:
    return SampleSpec(words, len(words), PLACES, SIDE, tiles="6")


@pytest.mark.parametrize("size", SIZES[1:])
def test_tiles_are_those_of_megatron_s_loop_and_the_thumbnail_is_the_whole_picture(
    spec: SampleSpec, size: tuple[int, int]
) -> None:
    image = photo(size)
    columns, rows = Tiling(6).grid(*size, SIDE)
    large = image.resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    boxes = [((n % columns) * SIDE, (n // columns) * SIDE) for n in range(columns * rows)]
    expected = [large.crop((left, top, left + SIDE, top + SIDE)) for left, top in boxes]
    expected.append(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    found = PixelTransform(spec).levels(image).transpose(0, 2, 3, 1).astype(int)
    assert len(found) == columns * rows + 1
    assert np.abs(found - np.stack([np.asarray(tile).astype(int) for tile in expected])).max() <= 2
    alone = PixelTransform(replace(spec, tiles=""))(image)
    assert torch.equal(PixelTransform(spec)(image)[-1], alone)


def test_a_picture_of_one_tile_has_no_other_and_only_the_tag_of_a_thumbnail(spec: SampleSpec) -> None:
    image = photo((SIDE, SIDE))
    assert torch.equal(PixelTransform(spec)(image)[0], PixelTransform(replace(spec, tiles=""))(image))
    assert PixelTransform(spec)(image).shape[0] == PixelTransform(spec).squares(image) == 1
    assert tile_tags(1, 6) == ["<tile_global_thumbnail>"]
    assert tile_tags(3, 12) == ["<tile_01>", "<tile_02>", "<tile_global_thumbnail>"]


@pytest.mark.parametrize("tiles", ["6", "6:untagged", "6:area"])
def test_each_tile_is_its_tag_and_its_placeholders_wherever_pictures_stand(spec: SampleSpec, tiles: str) -> None:
    spec = replace(spec, tiles=tiles)
    transform, encoder = PixelTransform(spec), ConversationEncoder(spec)
    images = [photo(SIZES[n], n) for n in (0, 3, 2)]
    sample = encoder.encode("k", TURNS, [transform(image) for image in images], ["a", "b", "c"])
    text = spec.tokenizer.apply_chat_template(
        [m for t in TURNS for m in ({"role": "user", "content": t.human}, {"role": "assistant", "content": t.gpt})],
        tokenize=False,
    )
    expected: list[int] = []
    for piece, image in zip(text.split("<image>"), [*images, None], strict=True):
        expected += spec.tokenizer(piece, add_special_tokens=False)["input_ids"]
        count = 0 if image is None else Tiling.parse(tiles).count(*image.size, SIDE)
        tags = [f"<tile_{n}>" for n in range(1, count)] + ["<tile_global_thumbnail>"] * (count > 0)
        for tag in tags:
            expected += [] if "untagged" in tiles else spec.tokenizer(tag, add_special_tokens=False)["input_ids"]
            expected += [spec.image_token_id] * PLACES
    assert sample.input_ids.tolist() == expected
    learned = sample.labels != IGNORE_INDEX
    assert torch.equal(sample.labels[learned], sample.input_ids[learned])
    assert set(spec.tokenizer.decode(sample.labels[learned]).split()) == {"red", "blue", "</s>"}
    counts = [transform.squares(image) for image in images]
    assert len(sample.pixel_values) == len(sample.image_keys) == len(set(sample.image_keys)) == sum(counts)
    assert encoder.length(TURNS, tuple(counts)) == len(expected)
    assert sample.image_keys[0] == "a"  # one tile


def test_a_picture_is_left_out_whole_where_its_tiles_do_not_fit(spec: SampleSpec) -> None:
    pixels = [PixelTransform(spec)(photo(SIZES[n])) for n in (0, 3, 2)]
    turns = (Turn("<image> what is left ?", "red"), *(Turn("<image> and ?", "blue"),) * 2)
    first = ConversationEncoder(spec).length(turns[:1])
    sample = ConversationEncoder(spec, first + 30).encode("k", turns, pixels, ["a", "b", "c"])
    assert sample.image_keys == ["a"]
    assert int((sample.input_ids == spec.image_token_id).sum()) == PLACES * len(sample.pixel_values) == PLACES


def test_a_tokenizer_that_cannot_tell_tags_apart_is_refused(spec: SampleSpec) -> None:
    plain = word_tokenizer(["what is left ? red"])
    with pytest.raises(UserError, match="tells the tags of tiles apart, .* `6:untagged`"):
        ConversationEncoder(replace(spec, tokenizer=plain))
    ConversationEncoder(replace(spec, tokenizer=plain, tiles="6:untagged"))


@pytest.mark.parametrize("text", ["0", "x", "6:", "6:2d", "6:area,area", "100", "6.5"])
def test_other_ways_to_cut_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"Expected `encoder.features.tiles` as a number of tiles from 1 to 99"):
        Tiling.parse(text)


def test_a_tower_that_is_trained_alone_is_not_given_tiles() -> None:
    with pytest.raises(UserError, match=r"Expected no `features.tiles` of a tower that is trained alone, got 6"):
        VisionEncoder(name="timm/test_resnet", image_size=SIDE, features=FeatureSpec(tiles=6), tokenizer="x")


@pytest.mark.parametrize("orientation", range(10))
def test_tiles_are_counted_from_the_head_of_a_file_as_its_upright_pixels_are_cut(
    spec: SampleSpec, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    transform, data = PixelTransform(spec), as_file(photo((90, 33)), "JPEG", exif=exif)
    assert transform.squares(open_image(data, "x")) == len(transform(decode_image(data, "x"))) == 4
    assert (transform.tiling.grid(*decode_image(data, "x").size, SIDE) == (1, 3)) == (orientation in (5, 6, 7, 8))
