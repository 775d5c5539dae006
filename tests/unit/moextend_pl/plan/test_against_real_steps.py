"""Predicted bytes and operations against a real step of a small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.real_steps import counter, make_step, measured_bytes, saved_bytes, size
from helpers.stages import write_stage
from helpers.tiny_world import TinyWorld, build_tiny_world, make_plan, tiny_mixtral, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moextend_pl import cli
from moextend_pl.plan.cost import checkpoint_bytes, memory
from moextend_pl.plan.operations import operations
from moextend_pl.plan.shapes import read_shape
from moextend_pl.plan.stage_model import read_stage
from moextend_pl.runs.manifest import DELTA_FILE

GROWTH = ["new_experts", "new_routers", "calibration"]
PARTS = {
    "extension": ["projector", *GROWTH],
    "extension of the upper half, projector frozen": GROWTH,
    "projector": ["projector"],
    "routers": ["routers"],
    "tower and projector": ["encoder", "projector"],
    "everything but the tower": ["projector", "language", "routers"],
}
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8,
}  # fmt: skip


# The other families of the full-size recipes: more experts and selections, norms of queries and keys.
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32},
    "olmoe": {"intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny world whose language model is large enough that activations matter."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"))
    tiny_mixtral(len(tiny_tokenizer()), **SIZES).save_pretrained(world.base)
    return world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_predicted_memory_is_that_of_a_real_step(world: TinyWorld, parts: list[str], dtype: torch.dtype) -> None:
    step = make_step(world, parts, dtype)
    weights, gradients, moments, activations = measured_bytes(step)
    predicted = memory(step.shape, step.run)
    assert (predicted.weights, predicted.gradients, predicted.optimizer) == (weights, gradients, moments)
    # The example would prove nothing where activations do not matter.
    assert activations > 0.2 * weights
    assert predicted.activations == pytest.approx(activations, rel=0.04)
    # `plan` does not know how the router will choose and takes an even spread.
    even = memory(step.shape, replace(step.run, new_share=None))
    total = weights + gradients + moments + activations
    assert even.total - even.temporaries == pytest.approx(total, rel=0.15)


def test_predicted_memory_of_a_base_in_four_bits_is_that_of_a_real_one(world: TinyWorld) -> None:
    pytest.importorskip("bitsandbytes")
    step = make_step(world, PARTS["extension"], torch.float32, lambda: world.unbuilt(quantize="nf4"))
    predicted = memory(step.shape, step.run)
    assert predicted.weights == size([*step.model.parameters(), *step.model.buffers()])
    assert predicted.weights < 0.5 * memory(step.shape, replace(step.run, nf4=False)).weights
    _, activations = saved_bytes(step.model, step.batch)
    assert predicted.activations == pytest.approx(activations, rel=0.04)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_predicted_operations_are_those_that_torch_counts(world: TinyWorld, parts: list[str]) -> None:
    step = make_step(world, parts, torch.float32)
    with counter() as counted:
        loss = step.model(step.batch).loss
        forward = counted.get_total_flops()
        loss.backward()
    predicted = operations(step.shape, step.run)
    # The extension of two layers counts with the mean of their shares.
    # Rotary positions are a small product in transformers 5.17.
    tolerance = 0.01 if "new_experts" in parts else 1e-6
    assert predicted.total == pytest.approx(counted.get_total_flops(), rel=tolerance)
    if "encoder" not in parts:
        assert predicted.forward + predicted.tower == pytest.approx(forward, rel=tolerance)


def test_files_of_a_real_run_have_the_predicted_sizes(world: TinyWorld, tmp_path: Path) -> None:
    make_plan((2, 3)).save(tmp_path / "plan.yaml")
    path = write_stage(world, tmp_path / "run", "extend", plan=tmp_path / "plan.yaml", steps=2)
    stage = read_stage(["--config", str(path)])
    shape = read_shape(stage.module, stage.compute_dtype.itemsize)
    cli.run(["fit", "--config", str(path)])
    delta = load_file(tmp_path / "run" / DELTA_FILE)
    assert shape.delta_bytes == size(list(delta.values()))
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    states = checkpoint["optimizer_states"][0]["state"].values()
    tensors = [*checkpoint["state_dict"].values(), *(value for state in states for value in state.values())]
    assert checkpoint_bytes(shape) == pytest.approx(size(tensors), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_holds_for_the_families_of_the_recipes(family: str, tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path)
    sizes = {name: value for name, value in SIZES.items() if name != "num_local_experts"}
    words = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**sizes, **words, **FAMILIES[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(world.base)
    step = make_step(world, PARTS["extension"], torch.bfloat16)
    _, activations = saved_bytes(step.model, step.batch)
    assert memory(step.shape, step.run).activations == pytest.approx(activations, rel=0.04)
    # In 32 bits: a CPU's products of experts in 16 bits are of whole steps of rows.
    step = make_step(world, PARTS["extension"], torch.float32)
    with counter() as counted:
        step.model(step.batch).loss.backward()
    assert operations(step.shape, step.run).total == pytest.approx(counted.get_total_flops(), rel=0.02)
