"""Published checkpoints become run directories of this project, and come back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moextend_pl import cli
from moextend_pl.contracts import ExtensionPlan, UserError
from moextend_pl.convert.files import TensorFiles, write_shards
from moextend_pl.manifest import read_manifest
from moextend_pl.module import MoExtend

WIDTH, VISION, SIDE, LAYERS = 16, 8, 16, 3
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 30, "head_dim": 8}


def random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw) * 0.3


def clip_tensors(draw: torch.Generator, experts: int, prefix: str) -> dict[str, Tensor]:
    """The names of section 3.7 written out, with random values."""
    t = {
        "embeddings.class_embedding": random(draw, VISION),
        "embeddings.patch_embedding.weight": random(draw, VISION, 3, 4, 4),
        "embeddings.position_embedding.weight": random(draw, 17, VISION),
        "pre_layrnorm.weight": random(draw, VISION),
        "pre_layrnorm.bias": random(draw, VISION),
    }
    for layer in range(LAYERS):
        block = f"encoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            t[f"{block}self_attn.{name}_proj.weight"] = random(draw, VISION, VISION)
            t[f"{block}self_attn.{name}_proj.bias"] = random(draw, VISION)
        for name in ("layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias"):
            t[block + name] = random(draw, VISION)
        if experts:
            t[f"{block}gate.weight"] = random(draw, experts, VISION)
        for mlp in [f"experts.{e}." for e in range(experts)] or ["mlp."]:
            t |= {f"{block}{mlp}fc1.weight": random(draw, 12, VISION), f"{block}{mlp}fc1.bias": random(draw, 12)}
            t |= {f"{block}{mlp}fc2.weight": random(draw, VISION, 12), f"{block}{mlp}fc2.bias": random(draw, VISION)}
    return {prefix + name: tensor for name, tensor in t.items()}


def projector_tensors(draw: torch.Generator, experts: int, prefix: str, scales: int) -> dict[str, Tensor]:
    t = {f"{prefix}gate.weight": random(draw, experts, VISION * scales)} if experts else {}
    for mlp in [f"experts.{e}." for e in range(experts)] or [""]:
        t |= {
            f"{prefix}{mlp}0.weight": random(draw, WIDTH, VISION * scales),
            f"{prefix}{mlp}0.bias": random(draw, WIDTH),
        }
        t |= {f"{prefix}{mlp}2.weight": random(draw, WIDTH, WIDTH), f"{prefix}{mlp}2.bias": random(draw, WIDTH)}
    return t


def language_tensors(kind: str, folder: Path) -> dict[str, Tensor]:
    """A stock model as transformers writes it; for Mixtral that is the layout of one tensor for each expert."""
    torch.manual_seed(1)
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES))
    else:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_published(folder: Path, tensors: dict[str, Tensor], config: dict, suffix: str = ".safetensors") -> Path:
    folder.mkdir()
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        chosen = {name: tensors[name].contiguous() for name in part}
        file = folder / f"model-{number}{suffix}"
        torch.save(chosen, file) if suffix == ".bin" else save_file(chosen, file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    def make(name: str, suffix: str = ".safetensors") -> tuple[Path, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        kind = "mistral" if "mistral" in name else "mixtral"
        experts = 0 if "dense" in name else 4
        if name.startswith("cumo"):
            tensors = clip_tensors(draw, experts, "model.vision_tower.vision_model.")
            tensors |= projector_tensors(draw, experts, "model.mm_projector.", 2)
            config = {"model_type": f"llava_{kind}", "scales": [1, 3], "balance_loss_coef": 0.1, "num_selected": 2}
        else:
            tensors = clip_tensors(draw, 0, "model.visual.vision_tower.vision_model.")
            tensors |= projector_tensors(draw, 0, "model.visual.mm_projector.", 1)
            config = {"model_type": "mixtral"}
        stock = language_tensors(kind, tmp_path / "stock")
        if name.startswith("moextend"):
            block = "model.layers.1.block_sparse_moe."
            stock[f"{block}gate_vision.weight"] = random(draw, 1, WIDTH)
            stock[f"{block}weight_scale.weight_scale.0.weight"] = random(draw, 8, 5)
            stock[f"{block}weight_scale.weight_scale.2.weight"] = random(draw, 5, 8)
            for w, shape in (("w1", (24, WIDTH)), ("w2", (WIDTH, 24)), ("w3", (24, WIDTH))):
                stock[f"{block}experts.4.{w}.weight"] = random(draw, *shape)
        config = {**json.loads((tmp_path / "stock" / "config.json").read_text()), **config}
        return write_published(tmp_path / "published", {**tensors, **stock}, config, suffix), {**tensors, **stock}

    return make


def convert(layout: str, source: Path, target: Path, *more: str) -> None:
    assert cli.run(["convert", layout, "--from", str(source), "--to", str(target), *more]) == 0


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


def test_large_checkpoints_are_written_in_shards_that_transformers_reads(tmp_path: Path) -> None:
    tensors = language_tensors("mistral", tmp_path / "stock")
    write_shards(iter(tensors.items()), tmp_path / "out", shard_bytes=2000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    (tmp_path / "out" / "config.json").write_text((tmp_path / "stock" / "config.json").read_text())
    model = MistralForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in tensors.items())
