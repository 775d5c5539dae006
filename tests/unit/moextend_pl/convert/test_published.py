"""Published checkpoints become run directories of this project, and come back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.published import LAYERS, SIDE, VISION, clip_tensors, convert, language_tensors, projector_tensors
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralForCausalLM, MixtralForCausalLM

from moextend_pl.contracts import ExtensionPlan, UserError
from moextend_pl.convert.files import TensorFiles, write_shards
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.manifest import read_manifest

CASES = ["cumo mistral", "cumo mistral dense", "cumo mixtral", "moextend"]


@pytest.mark.parametrize("name", CASES)
def test_round_trip_gives_every_tensor_back(published: Callable, name: str, tmp_path: Path) -> None:
    source, tensors = published(name)
    layout = name.split()[0]
    convert(layout, source, tmp_path / "run", "--heads", "2")
    convert(layout, tmp_path / "run", tmp_path / "back", "--back")
    back = TensorFiles(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in tensors.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    report = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert sorted(key for line in report["tensors"] for key in line["published"]) == sorted(tensors)


@pytest.mark.parametrize("name", CASES)
def test_converted_run_builds_the_model_and_holds_the_published_values(
    published: Callable, name: str, tmp_path: Path
) -> None:
    source, tensors = published(name, ".bin")
    convert(name.split()[0], source, tmp_path / "run", "--heads", "2")
    model = MoExtend.load(tmp_path / "run")
    stock = (MistralForCausalLM if "mistral" in name else MixtralForCausalLM).from_pretrained(
        tmp_path / "stock", dtype=torch.float32
    )
    ids = torch.tensor([[3, 7, 9, 1]])
    with torch.no_grad():
        if name != "moextend":
            torch.testing.assert_close(model.language.model(ids).logits, stock.eval()(ids).logits)
    features = model.encoder(torch.randn(2, 3, SIDE, SIDE))
    assert features.shape == (2, 16, VISION * (1 if name == "moextend" else 2))
    if name == "moextend":
        block = model.language.model.model.layers[1].mlp
        prefix = "model.layers.1.block_sparse_moe."
        assert torch.equal(block.gate.weight, tensors[f"{prefix}gate_vision.weight"])
        assert torch.equal(block.gate.calibration.in_proj, tensors[f"{prefix}weight_scale.weight_scale.0.weight"])
        first = torch.cat([tensors[f"{prefix}experts.4.{w}.weight"] for w in ("w1", "w3")])
        assert torch.equal(block.experts.new.gate_up_proj[0], first)
        assert torch.equal(block.experts.new.down_proj[0], tensors[f"{prefix}experts.4.w2.weight"])
        assert torch.equal(block.gate.base.weight, tensors[f"{prefix}gate.weight"])
        plan = ExtensionPlan.load(tmp_path / "run" / "extension_plan.yaml")
        assert (plan,) == read_manifest(tmp_path / "run").plans
    elif "dense" not in name:
        expected = torch.stack([tensors[f"model.mm_projector.experts.{e}.2.weight"] for e in range(4)])
        assert torch.equal(model.projector.layers.experts.down_proj, expected)


def test_dense_tower_is_transformers_own_clip(published: Callable, tmp_path: Path) -> None:
    source, tensors = published("cumo mistral dense")
    convert("cumo", source, tmp_path / "run", "--heads", "2")
    sizes = {"hidden_size": VISION, "intermediate_size": 12, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    stock = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=4)).eval()
    prefix = "model.vision_tower.vision_model."
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    assert set(stock.load_state_dict(own, strict=False).missing_keys) == {
        "post_layernorm.weight",
        "post_layernorm.bias",
    }
    pixels = torch.randn(2, 3, SIDE, SIDE)
    encoder = MoExtend.load(tmp_path / "run").encoder
    encoder.config["scales"] = [1]
    with torch.no_grad():
        expected = stock(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("file", ["clip.bin", "mm_projector.bin"])
def test_single_files_of_cumo_make_the_round_trip(file: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    makes = {
        "clip.bin": clip_tensors(draw, 4, "vision_model."),
        "mm_projector.bin": projector_tensors(draw, 4, "model.mm_projector.", 2),
    }
    torch.save(makes[file], tmp_path / file)
    convert("cumo", tmp_path / file, tmp_path / "run", "--heads", "2")
    convert("cumo", tmp_path / "run", tmp_path / "back", "--back")
    back = torch.load(tmp_path / "back" / file, weights_only=True)
    assert set(back) == set(makes[file])
    assert all(torch.equal(back[key], tensor) for key, tensor in makes[file].items())


@pytest.mark.parametrize("change", ["missing", "unexpected"])
@pytest.mark.parametrize("name", ["cumo mistral", "moextend"])
def test_missing_and_unexpected_keys_are_errors_and_nothing_is_written(
    published: Callable, name: str, change: str, tmp_path: Path
) -> None:
    source, _ = published(name)
    key = "model.layers.0.self_attn.k_proj.weight"
    file = next(f for f in source.glob("*.safetensors") if key in load_file(f))
    held = load_file(file)
    wrong = (
        {k: v for k, v in held.items() if k != key} if change == "missing" else {**held, "model.extra": torch.ones(1)}
    )
    save_file(wrong, file)
    with pytest.raises(UserError, match=rf"1 {change} \['{key if change == 'missing' else 'model.extra'}'\]"):
        convert(name.split()[0], source, tmp_path / "run", "--heads", "2")
    assert not (tmp_path / "run").exists()


def test_heads_that_the_tensors_do_not_tell_are_asked_for(published: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected `--heads`"):
        convert("cumo", published("cumo mistral")[0], tmp_path / "run")


def test_full_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(UserError, match="new or empty folder"):
        convert("cumo", tmp_path, tmp_path / "run")


@pytest.mark.parametrize("heads", ["0", "-2", "3"])
def test_heads_that_cannot_be_are_refused(published: Callable, heads: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"Expected `--heads` .* got {heads}\."):
        convert("cumo", published("cumo mistral")[0], tmp_path / "run", "--heads", heads)
    assert not (tmp_path / "run").exists()


def test_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="which is a file"):
        convert("cumo", tmp_path, tmp_path / "run")


def test_large_checkpoints_are_written_in_shards_that_transformers_reads(tmp_path: Path) -> None:
    tensors = language_tensors("mistral", tmp_path / "stock")
    write_shards(iter(tensors.items()), tmp_path / "out", shard_bytes=2000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    (tmp_path / "out" / "config.json").write_text((tmp_path / "stock" / "config.json").read_text())
    model = MistralForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in tensors.items())
