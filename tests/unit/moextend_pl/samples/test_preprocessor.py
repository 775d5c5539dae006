"""What a tower's preprocessor_config.json says of its pictures is followed as transformers follows it, or told."""

from __future__ import annotations

import json

import pytest
import torch
from test_squares import SIDE, SIZES, clip, photo
from transformers import AutoImageProcessor, CLIPImageProcessor, DeiTImageProcessor, SiglipImageProcessor
from transformers import ViTImageProcessor as Vit

from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.samples.pixels import PixelTransform
from moextend_pl.samples.preprocessor import (
    own_resample,
    own_resize,
    own_statistics,
    read_preprocessor,
    unheeded,
)

SQUARE = {"height": SIDE, "width": SIDE}


def ours(image, facts):
    """Pixels as a tower with such a file takes them."""
    how = {"resize": own_resize(facts, SIDE), "resample": own_resample(facts) or "bicubic"}
    return PixelTransform(SampleSpec(None, 0, 0, image_size=SIDE, **how, **own_statistics(facts, "here")))(image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        Vit(size=SQUARE),  # bilinear
        *(SiglipImageProcessor(size=SQUARE, resample=each) for each in range(4)),
        clip(64),
        DeiTImageProcessor(size={"height": 64, "width": 64}, crop_size=SQUARE, resample=2),
        Vit(size=SQUARE, do_normalize=False, image_mean=[0.1] * 3),
        Vit(size=SQUARE, do_rescale=False, image_mean=[120.0, 110.0, 100.0], image_std=[60.0, 50.0, 40.0]),
        Vit(size=SQUARE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    ],
    ids=lambda processor: f"{type(processor).__name__}-{processor.resample}",
)
def test_pictures_are_those_of_the_processor_that_wrote_the_file(tmp_path, processor, size):
    processor.save_pretrained(tmp_path)
    image, facts = photo(size), read_preprocessor(str(tmp_path))
    # Its own Lanczos is Pillow's, which torch approximates.
    how = "pil" if processor.resample == 1 else "torchvision"
    expected = AutoImageProcessor.from_pretrained(tmp_path, backend=how)(image, return_tensors="pt")["pixel_values"][0]
    level = torch.tensor(own_statistics(facts, "here")["image_std"]).reshape(3, 1, 1) * 255
    levels = ((ours(image, facts) - expected) * level).abs()
    assert levels.max() <= 1.01  # of 255
    assert levels.mean() < 0.1
    assert unheeded(facts) == []


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast"])
def test_what_a_file_leaves_out_is_what_its_kind_takes(tmp_path, name):
    key = "feature_extractor_type" if name.endswith("Extractor") else "image_processor_type"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: name, "image_std": [1, 1, 1]}))
    facts = read_preprocessor(str(tmp_path / "nowhere"), str(tmp_path))
    assert (own_resize(facts, 224), own_resample(facts)) == ("crop", "bicubic")
    statistics = own_statistics(facts, "here")
    assert statistics == {"image_mean": tuple(CLIPImageProcessor().image_mean), "image_std": (1.0, 1.0, 1.0)}
    assert own_resample({"image_mean": [0, 0, 0]}) is None


def test_a_file_of_a_newer_version_is_found_beside_the_tokenizers(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": Vit(size=SQUARE).to_dict()}))
    assert own_resample(read_preprocessor(str(tmp_path))) == "bilinear"


@pytest.mark.parametrize(
    ("facts", "resize"),
    [
        ({}, "squash"),
        ({"image_mean": [0, 0, 0]}, "squash"),
        ({"do_center_crop": True, "crop_size": 224, "size": 224}, "crop"),
        (CLIPImageProcessor().to_dict(), "crop"),
        (SiglipImageProcessor().to_dict(), "squash"),
        ({"do_center_crop": True, "crop_size": {"height": 224}, "size": {"shortest_edge": 256}}, "crop:256"),
        ({"do_center_crop": False, "crop_size": 224, "size": {"shortest_edge": 224}}, "squash"),
        ({"do_center_crop": True, "crop_size": 224, "size": {"height": 224, "width": 224}}, "squash"),
        ({"do_center_crop": True, "crop_size": 224, "size": {"height": 256, "width": 256}}, "squash:256"),
        ({**clip().to_dict(), "image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
        ({"image_processor_type": "DetrImageProcessor", "do_pad": True}, "squash"),
    ],
)
def test_what_a_tower_says_of_the_shape_of_its_pictures_is_read(facts, resize):
    assert own_resize(facts, 224) == resize


def test_a_larger_square_sees_the_same_part():
    facts = {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 256}}
    assert own_resize(facts, 448) == "crop:512"


def test_what_is_not_followed_is_told():
    told = {"max_num_patches": 256, "do_flip_channel_order": True, "do_pad": True, "size": {"longest_edge": 9}}
    expected = ["max_num_patches=256", "do_flip_channel_order=true", "do_pad=true", 'size={"longest_edge": 9}']
    assert unheeded({**told, "do_resize": False, "do_thumbnail": False}) == [*expected, "do_resize=false"]
    assert unheeded({**CLIPImageProcessor().to_dict(), "do_reduce_labels": True}) == []


def test_damaged_words_are_told(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("[]]")
    with pytest.raises(UserError, match="expected facts about pictures in JSON, got "):
        read_preprocessor(str(tmp_path))
    with pytest.raises(UserError, match="`resample` of preprocessor_config.json as a number of Pillow's.*got 9"):
        own_resample({"resample": 9})
    with pytest.raises(UserError, match=r"`image_mean` and `image_std` in here, got KeyError\('image_mean'\)"):
        own_statistics({}, "here")
