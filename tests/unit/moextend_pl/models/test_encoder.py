"""The vision tower, from timm and from transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_world import SIDE, TinyWorld, make_plan
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moextend_pl.contracts import Batch, UserError
from moextend_pl.models.delta import encoder_arguments, save_delta
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.moextend import MoExtend
from moextend_pl.models.tower import PREPROCESSOR_FILE, FeatureSpec

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def save_clip(folder: Path) -> CLIPVisionModel:
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=8)).eval()
    model.save_pretrained(folder)
    return model


def save_siglip(folder: Path) -> SiglipVisionModel:
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=SIDE, patch_size=8)).eval()
    model.save_pretrained(folder)
    return model


def timm_options(**changes: object) -> dict:
    return encoder_arguments({"name": "timm/test_resnet", "layer": 2, "image_size": SIDE, **changes})


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], VisionEncoder]:
    def tower(kind: str) -> VisionEncoder:
        if kind == "timm":
            return VisionEncoder(**timm_options())
        if kind == "timm pooled":
            return VisionEncoder(**timm_options(pool=2))
        if kind == "timm groupnorm":
            return VisionEncoder(**timm_options(layer=1, pool=4, tower_args={"norm_layer": "groupnorm1"}))
        {"clip": save_clip, "siglip": save_siglip}[kind.split()[0]](tmp_path / "hf")
        return VisionEncoder(
            name=str(tmp_path / "hf"), image_size=SIDE, features=FeatureSpec(pool=2 if "pooled" in kind else 1)
        )

    return tower


KINDS = ["timm", "timm pooled", "timm groupnorm", "clip", "clip pooled", "siglip"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_returns_as_many_tokens_and_channels_as_stated(make: Callable, kind: str) -> None:
    encoder = make(kind)
    stated = encoder.tokens_per_image  # before anything is built
    encoder.configure_model()
    features = encoder.eval()(PIXELS)
    assert features.shape == (3, stated, encoder.channels)
    assert stated > 1


def test_missing_tokenizer_is_one_sentence() -> None:
    with pytest.raises(UserError, match="Expected a tokenizer folder at nowhere, found none"):
        VisionEncoder(**timm_options(tokenizer="nowhere")).sample_spec()


@pytest.mark.parametrize("side", [60, 64, 100])
@torch.no_grad()
def test_side_that_does_not_divide_is_rounded_as_the_layers_round(side: int) -> None:
    encoder = VisionEncoder(**timm_options(image_size=side))
    stated = encoder.tokens_per_image
    encoder.configure_model()
    assert encoder.eval()(torch.zeros(1, 3, side, side)).shape[1] == stated


@pytest.mark.parametrize("save", [save_clip, save_siglip], ids=["clip", "siglip"])
def test_tower_of_another_image_size_is_refused_before_it_is_built(save: Callable, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not to be read")
    with pytest.raises(UserError, match=rf"`encoder.image_size` {SIDE}, .* got {2 * SIDE}"):
        _ = VisionEncoder(name=str(tmp_path), image_size=2 * SIDE).tokens_per_image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": 0}, r"`encoder.features.pool` in 1\.\.4, .* got 0"),
        ({"pool": 5}, r"`encoder.features.pool` in 1\.\.4, .* got 5"),
        ({"name": "timm/test_vit", "layer": -2, "image_size": 100}, "does not take images of .* 100: Input height"),
        ({"name": "timm/swin_tiny_patch4_window7_224", "image_size": 224}, r"square grid .* got \(14, 14, 384\)"),
    ],
)
def test_impossible_grid_is_refused_before_the_tower_is_built(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = VisionEncoder(**timm_options(**changes)).tokens_per_image


def test_dino_tower_takes_other_sizes_and_its_mask_token_is_not_read(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(tmp_path)
    encoder = VisionEncoder(name=str(tmp_path), image_size=SIDE + 16)
    assert encoder.tokens_per_image == (SIDE // 8 + 2) ** 2
    encoder.configure_model()
    encoder(torch.randn(2, 3, SIDE + 16, SIDE + 16)).sum().backward()
    # A rank that waits for a gradient which never comes would wait for ever.
    parts = encoder.parts()
    assert [p.grad is None for p in parts["encoder"]] == [False] * len(parts["encoder"])
    assert encoder.tower.embeddings.mask_token.shape in {p.shape for p in parts["encoder_unread"]}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tower_survives_save_pretrained(make: Callable, kind: str, tmp_path: Path) -> None:
    encoder = make(kind)
    encoder.configure_model()
    encoder.save_pretrained(tmp_path / "saved")
    loaded = VisionEncoder(path=str(tmp_path / "saved"))
    assert loaded.tokens_per_image == encoder.tokens_per_image
    loaded.configure_model()
    assert torch.equal(loaded.eval()(PIXELS), encoder.eval()(PIXELS))


def test_saved_transformers_tower_says_how_pixels_are_normalised(tmp_path: Path) -> None:
    save_clip(tmp_path / "hf")
    statistics = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)}
    (tmp_path / "hf" / PREPROCESSOR_FILE).write_text(json.dumps(statistics))
    encoder = VisionEncoder(name=str(tmp_path / "hf"), image_size=SIDE)
    encoder.configure_model()
    encoder.save_pretrained(tmp_path / "saved")
    (tmp_path / "hf" / PREPROCESSOR_FILE).unlink()
    assert VisionEncoder(path=str(tmp_path / "saved")).image_statistics == statistics


@pytest.mark.parametrize("kind", ["timm", "clip"])
@torch.no_grad()
def test_tower_in_bf16_takes_pixels_in_single_precision(make: Callable, kind: str) -> None:
    encoder = make(kind)
    encoder.configure_model()
    expected = encoder.eval()(PIXELS)
    features = encoder.to(torch.bfloat16)(PIXELS)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("save", [save_clip, save_siglip], ids=["clip", "siglip"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
@torch.no_grad()
def test_features_are_the_chosen_hidden_state_without_class_token(save: Callable, layer: int, tmp_path: Path) -> None:
    model = save(tmp_path)
    encoder = VisionEncoder(name=str(tmp_path), features=FeatureSpec(layer=layer), image_size=SIDE)
    encoder.configure_model()
    expected = model(PIXELS, output_hidden_states=True).hidden_states[layer]
    expected = expected[:, 1:] if isinstance(model, CLIPVisionModel) else expected
    torch.testing.assert_close(encoder.eval()(PIXELS), expected)


WITH_TEXT = {
    "clip": (CLIPModel, CLIPConfig, {"projection_dim": 8}),
    "siglip": (SiglipModel, SiglipConfig, {}),
}


@pytest.mark.parametrize("kind", WITH_TEXT)
@torch.no_grad()
def test_of_a_model_of_images_and_texts_the_image_side_is_taken(kind: str, tmp_path: Path) -> None:
    build, config, more = WITH_TEXT[kind]
    text = {**SIZES, "vocab_size": 9, "max_position_embeddings": 8}
    vision = {**SIZES, "image_size": SIDE, "patch_size": 8}
    whole = build(config(text_config=text, vision_config=vision, **more)).eval()
    whole.save_pretrained(tmp_path)
    encoder = VisionEncoder(name=str(tmp_path), features=FeatureSpec(layer=-2), image_size=SIDE)
    encoder.configure_model()
    expected = whole.vision_model(PIXELS, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(encoder.eval()(PIXELS), expected[:, -16:])
    assert encoder.channels == SIZES["hidden_size"]
    # All but the last block, behind the hidden state that is read.
    read = set(whole.vision_model.parameters()) - set(whole.vision_model.encoder.layers[-1].parameters())
    assert len(list(encoder.parameters())) == len(read)


def test_pixels_are_normalised_as_the_transformers_tower_learned(tiny_world: TinyWorld, tmp_path: Path) -> None:
    save_clip(tmp_path)
    model = tiny_world.unbuilt()
    model.encoder = VisionEncoder(name=str(tmp_path), image_size=SIDE)
    with pytest.raises(UserError, match=r"Expected `image_mean` and `image_std` in .*preprocessor_config\.json"):
        model.sample_spec()
    (tmp_path / PREPROCESSOR_FILE).write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    spec = model.sample_spec()
    assert (spec.image_mean, spec.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_run_with_a_transformers_tower_is_loaded_again_from_its_delta(tiny_world: TinyWorld, tmp_path: Path) -> None:
    save_siglip(tmp_path / "weights")
    model = tiny_world.unbuilt()
    model.encoder = VisionEncoder(name=str(tmp_path / "weights"), features=FeatureSpec(layer=1), image_size=SIDE)
    model.configure_model()
    manifest = save_delta(model, tmp_path / "run")
    assert manifest.model["encoder"]["name"] == "../weights"
    loaded = MoExtend.load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded.encoder(PIXELS), model.eval().encoder(PIXELS))


def test_on_the_meta_device_a_tower_is_built_from_its_config_alone(tmp_path: Path) -> None:
    save_clip(tmp_path / "whole")
    (tmp_path / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    encoder = VisionEncoder(name=str(tmp_path), image_size=SIDE)
    with torch.device("meta"):
        encoder.configure_model()
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    assert encoder.channels == SIZES["hidden_size"]


@torch.no_grad()
def test_pooling_averages_squares_of_the_grid() -> None:
    plain, pooled = VisionEncoder(**timm_options()), VisionEncoder(**timm_options(pool=2))
    for encoder in (plain, pooled):
        encoder.configure_model()
        encoder.eval()
    grid = plain(PIXELS).reshape(3, 4, 4, -1)
    got = pooled(PIXELS).reshape(3, 2, 2, -1)
    for row in range(2):
        for column in range(2):
            square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(got[:, row, column], square.mean(dim=(1, 2)))


def test_tower_alone_is_one_part_and_heads_another(tiny_world: TinyWorld) -> None:
    encoder = VisionEncoder(**timm_options(), tokenizer=str(tiny_world.base), embedding_dim=8)
    encoder.configure_model()
    parts = encoder.parts()
    assert {id(p) for p in parts["encoder"]} == {id(p) for p in encoder.tower.parameters()}
    assert len(parts["heads"]) == 4
    assert encoder.sample_spec().tokens_per_image == 16


def test_tower_without_name_or_tokenizer_or_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected `name` or `path`"):
        VisionEncoder()
    with pytest.raises(UserError, match="Expected `tokenizer`"):
        VisionEncoder(**timm_options()).sample_spec()
    with pytest.raises(UserError, match=r"Expected a vision encoder.*found none"):
        VisionEncoder(path=str(tmp_path))
    with pytest.raises(UserError, match=r"Expected a transformers vision model in .*found no config\.json"):
        VisionEncoder(name=str(tmp_path))


def contrast_batch(captions: list[list[int]], tiny_world: TinyWorld) -> Batch:
    width = max(map(len, captions)) + 1
    labels = torch.full((len(captions), width), -100)
    for row, ids in zip(labels, captions, strict=True):
        row[1 : 1 + len(ids)] = torch.tensor(ids)
    pixels = torch.randn(len(captions), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"keys": [""] * len(captions), "labels": labels, "pixel_values": pixels}


def test_contrast_equals_a_loop_in_which_equal_captions_are_one(tiny_world: TinyWorld) -> None:
    encoder = VisionEncoder(**timm_options(), tokenizer=str(tiny_world.base), embedding_dim=8)
    encoder.configure_model()
    encoder.eval()
    encoder.all_gather = lambda tensor, **_: tensor[None]
    captions = [[4, 5, 6], [7, 8], [4, 5, 6], [6, 5, 4], [4, 5]]
    batch = contrast_batch(captions, tiny_world)
    loss, accuracy = encoder._contrast(batch)
    images = F.normalize(encoder.image_head(encoder(batch["pixel_values"]).mean(1)), dim=-1)
    texts = [F.normalize(encoder.caption_head.weight[ids].mean(0), dim=0) for ids in captions]
    losses, hits = [], []
    for i, image in enumerate(images):
        scores = torch.stack([encoder.log_scale.exp() * image @ text for text in texts])
        own = [j for j, caption in enumerate(captions) if caption == captions[i]]
        losses.append(-scores.log_softmax(0)[own].mean())
        hits.append(float(int(scores.argmax()) in own))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert accuracy.item() == pytest.approx(sum(hits) / len(hits))


def features_of(model: object, batch: Batch) -> dict[str, Tensor]:
    return dict(zip(batch["image_keys"], model.encode(batch["pixel_values"], batch["image_keys"]), strict=True))


def test_cached_features_equal_uncached_ones_whatever_company_an_image_keeps(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(make_plan(), parts=["projector"])
    batches = [tiny_world.batch(model, "i" * count, first=first) for first, count in ((0, 20), (3, 1), (2, 7))]
    model.cache_features = False
    uncached = [features_of(model, batch) for batch in batches]
    assert model.features.features == {}
    model.cache_features = True
    cached = [features_of(model, batch) for batch in batches]
    model.features.clear()
    other_order = [features_of(model, batch) for batch in reversed(batches)][::-1]
    for first, second, third in zip(uncached, cached, other_order, strict=True):
        for name, value in first.items():
            assert torch.equal(value, uncached[0].get(name, value))
            assert torch.equal(value, second[name])
            assert torch.equal(value, third[name])
    with torch.no_grad():
        direct = model.encoder(batches[0]["pixel_values"])
    torch.testing.assert_close(torch.stack(list(cached[0].values())), direct)


def test_frozen_tower_encodes_each_image_once(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(parts=["projector"])
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))
    batch = tiny_world.batch(model, "iti")
    model.encode(batch["pixel_values"], batch["image_keys"])
    model.encode(batch["pixel_values"], batch["image_keys"])
    assert len(seen) == 1


def test_learning_tower_is_encoded_anew_with_gradients(tiny_world: TinyWorld) -> None:
    model = tiny_world.model(parts=["projector", "encoder"])
    batch = tiny_world.batch(model, "ii")
    features = model.encode(batch["pixel_values"], batch["image_keys"])
    assert features.requires_grad
    assert model.features.features == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "timm/resnet10x"}, "a model of timm, got 'resnet10x'; did you mean 'timm/resnet"),
        ({"layer": 99}, "timm cannot build 'resnet10t' with `layer` 99"),
        ({"tower_args": {"widht": 3}}, "widht"),
        ({"image_size": 0}, "`encoder.image_size` of at least 1, got 0"),
    ],
)
def test_tower_that_cannot_be_is_refused_before_it_is_built(options: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"name": "timm/resnet10t", "layer": 1, "image_size": 64, **options}
    with pytest.raises(UserError) as caught:
        _ = VisionEncoder(**encoder_arguments(arguments)).tokens_per_image
    assert words in str(caught.value)


def test_tokenizer_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    tower = VisionEncoder(
        name="timm/resnet10t", features=FeatureSpec(layer=1), image_size=64, tokenizer=str(tmp_path / "nowhere")
    )
    with pytest.raises(UserError, match="Expected a tokenizer folder at .*nowhere"):
        tower.sample_spec()
