"""A published timm model is a tower with its own weights and its own pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.timm_towers import published
from PIL import Image
from timm.data import create_transform, resolve_data_config

from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.extend.timm_tower import pictures_of, save_timm_tower, timm_config
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.samples.pixels import PixelTransform


def test_its_features_of_a_picture_are_those_of_timm(tmp_path: Path) -> None:
    folder = tmp_path / "some.model"
    model = published(folder)
    place = save_timm_tower(folder, timm_config(folder), tmp_path / "run" / "tower")
    assert place.parent == tmp_path / "run" / "tower"
    assert place.name.startswith("some.model-")
    tower = VisionEncoder(path=str(place))
    tower.configure_model()
    facts: dict[str, Any] = {name: tower.config[name] for name in ("image_size", "resize", "resample")}
    facts.update(tower.image_statistics)
    noise = torch.randint(0, 256, (12, 9, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy()).resize((120, 90), Image.Resampling.BICUBIC)
    # With odd margins torchvision may place the middle a pixel off ours, which is transformers'.
    theirs = create_transform(**resolve_data_config(model=model))(image)
    ours = PixelTransform(SampleSpec(None, 0, 0, **facts))(image)  # type: ignore[arg-type]
    assert (ours - theirs).abs().max() < 2.1 / 255 / 0.2  # two levels of 255, as Pillow and torch differ
    features = timm.create_model("test_vit", img_size=64, features_only=True, out_indices=(-2,)).eval()
    features.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()}, strict=False)
    with torch.no_grad():
        expected = features(theirs[None])[-1].flatten(2).transpose(1, 2)
        assert torch.equal(tower.eval()(theirs[None]), expected)
    assert save_timm_tower(folder, {}, tmp_path / "run" / "tower") == place  # it is there already
    published(tmp_path / "other" / "some.model")
    other = save_timm_tower(tmp_path / "other" / "some.model", timm_config(folder), tmp_path / "run" / "tower")
    assert other != place
    assert (other / "encoder.json").is_file()


def test_only_a_folder_of_timm_is_taken_for_one(tmp_path: Path) -> None:
    assert timm_config(tmp_path) == {}
    for text in ("{", '{"model_type": "clip"}', '{"model_type": "x", "architecture": "y"}'):
        (tmp_path / "config.json").write_text(text)
        assert timm_config(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    with pytest.raises(UserError, match="Expected the weights of a timm model as model.safetensors in"):
        save_timm_tower(tmp_path, timm_config(tmp_path), tmp_path)


def test_pictures_are_named_as_elsewhere() -> None:
    assert pictures_of({})["resize"] == "crop:256"
    assert pictures_of({"crop_mode": "squash", "crop_pct": 1.0})["resize"] == "squash"
    with pytest.raises(UserError, match="`crop_mode` of a timm model out of center, squash, got 'border'"):
        pictures_of({"crop_mode": "border"})
