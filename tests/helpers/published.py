"""Tiny checkpoints in the published layouts of CuMo and MoExtend."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from moextend_pl import cli

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


def convert(layout: str, source: Path, target: Path, *more: str) -> None:
    assert cli.run(["convert", layout, "--from", str(source), "--to", str(target), *more]) == 0
