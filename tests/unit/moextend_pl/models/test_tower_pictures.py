"""Which pictures a tower takes is the tower's own word, stays with what was trained, and can be overruled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moextend_pl.contracts import UserError
from moextend_pl.models.encoder import CONFIG_FILE, VisionEncoder
from moextend_pl.models.tower import FeatureSpec
from moextend_pl.runs.manifest import Manifest

SIDE = 32
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def save(folder: Path, kind: str) -> str:
    square = {"height": SIDE, "width": SIDE}
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=SIDE)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    else:
        SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=SIDE)).save_pretrained(folder)
        SiglipImageProcessor(size=square).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "resize"), [("clip", "crop"), ("siglip", "squash")])
def test_a_tower_says_side_and_shape_of_its_pictures(tmp_path: Path, kind: str, resize: str) -> None:
    encoder = VisionEncoder(name=save(tmp_path, kind))
    assert (encoder.config["image_size"], encoder.config["resize"]) == (SIDE, resize)
    assert encoder.tokens_per_image == (SIDE // 8) ** 2
    (tmp_path / "preprocessor_config.json").unlink()
    assert VisionEncoder(name=str(tmp_path)).config["resize"] == "squash"


def test_a_timm_tower_says_its_side() -> None:
    assert VisionEncoder(name="timm/test_vit").config["image_size"] == 160
    assert VisionEncoder(name="timm/test_vit", image_size=224).config["resize"] == "squash"


def test_the_choice_of_a_stage_file_stays_with_the_tower_and_with_the_run(tmp_path: Path) -> None:
    encoder = VisionEncoder(name=save(tmp_path / "hf", "clip"), features=FeatureSpec(resize="pad"))
    assert encoder.rebuild_arguments()["resize"] == "pad"
    encoder.configure_model()
    encoder.save_pretrained(tmp_path / "saved")
    assert VisionEncoder(path=str(tmp_path / "saved")).config["resize"] == "pad"
    other = VisionEncoder(path=str(tmp_path / "saved"), features=FeatureSpec(resize="crop"))
    assert other.rebuild_arguments()["resize"] == "crop"


def test_what_was_trained_before_there_was_a_choice_stays_squashed(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", "clip")
    encoder = VisionEncoder(name=folder)
    encoder.configure_model()
    encoder.save_pretrained(tmp_path / "saved")
    facts = json.loads((tmp_path / "saved" / CONFIG_FILE).read_text())
    del facts["resize"]
    (tmp_path / "saved" / CONFIG_FILE).write_text(json.dumps(facts))
    assert VisionEncoder(path=str(tmp_path / "saved")).config["resize"] == "squash"
    (tmp_path / "config.json").write_text("{}")  # of the language model
    known = {"language": {"base": "."}, "projector": {}}
    for written, expected in (({"name": folder}, "squash"), ({"name": folder, "resize": "pad"}, "pad")):
        manifest = Manifest((), {"encoder": written, **known}, [], {}, "", {}, run=tmp_path)
        arguments = manifest.model_arguments()["encoder"]
        assert (arguments["resize"], arguments["resample"]) == (expected, "bicubic")


def test_a_tower_says_the_filter_of_its_pictures_and_what_is_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(save(tmp_path / "hf", "siglip"))
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**facts, "resample": 2, "do_pad": True}))
    encoder = VisionEncoder(name=str(folder))
    assert encoder.rebuild_arguments()["resample"] == "bilinear"
    assert "says of its pictures what is not followed: do_pad=true" in caplog.text
    encoder.configure_model()
    encoder.save_pretrained(tmp_path / "saved")
    assert VisionEncoder(path=str(tmp_path / "saved")).config["resample"] == "bilinear"
    stated = VisionEncoder(name=str(folder), features=FeatureSpec(resample="box"))
    assert stated.config["resample"] == "box"
    with pytest.raises(UserError, match=r"`encoder.features.resample` as one of nearest, .* got 'cubic'"):
        VisionEncoder(name=str(folder), features=FeatureSpec(resample="cubic"))


def test_a_wrong_word_is_told_before_a_tower_is_built() -> None:
    with pytest.raises(UserError, match=r"`encoder.features.resize` as `squash`.*got 'stretch'"):
        VisionEncoder(name="timm/test_vit", features=FeatureSpec(resize="stretch"))
