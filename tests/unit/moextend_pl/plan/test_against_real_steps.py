"""Predicted bytes and operations against a real step of a small model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stages import write_stage
from helpers.tiny_world import TinyWorld, build_tiny_world, make_plan, tiny_mixtral, tiny_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from moextend_pl import cli
from moextend_pl.checkpoint import DELTA_FILE
from moextend_pl.contracts import Batch, TrainPlan
from moextend_pl.module import ENCODE_TOGETHER, MoExtend
from moextend_pl.optim import OptimSpec, build_optimizer
from moextend_pl.plan.cost import RunShape, checkpoint_bytes, memory, operations
from moextend_pl.plan.facts import ModelShape
from moextend_pl.plan.shapes import read_shape
from moextend_pl.plan.stage_model import read_stage

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


@dataclass(frozen=True)
class Step:
    """A real step beside its prediction."""

    model: MoExtend
    batch: Batch
    shape: ModelShape
    run: RunShape


def predicted_positions(model: MoExtend, batch: Batch) -> int:
    """Counts the positions that the head is applied to; with transformers 5.17 whole columns of the batch."""
    positions: list[int] = []
    head = model.language.model.get_output_embeddings()
    with torch.no_grad(), head.register_forward_hook(lambda _, __, y: positions.append(y[..., 0].numel())):
        model(batch)
    return positions[0]


def make_step(world: TinyWorld, parts: list[str], dtype: torch.dtype, **options: Any) -> Step:
    plan = make_plan((2, 3), init="copy", routing="open") if "new_experts" in parts else None
    model = world.model(plan, parts, **options).to(dtype)
    model.train()
    model.encoder.eval()
    model.cache_features = False
    batch = world.batch(model, "iiittiii" * 2)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    unbuilt = world.unbuilt(**options)
    unbuilt.extension_plan, unbuilt.train_plan = plan, TrainPlan(tuple(parts))
    with torch.device("meta"):
        unbuilt.configure_model()
    sequences, length = batch["input_ids"].shape
    with torch.no_grad(), model.language.watch.recording() as records:
        model.language(batch, model.embed(batch))
    experts = min(record.num_experts for record in records)
    grown = [record.indices for record in records if record.num_experts > experts]
    run = RunShape(
        gpus=1,
        micro_batch=sequences,
        accumulate=1,
        steps=1,
        length=length,
        mean_length=length,
        images=len(batch["image_keys"]) / sequences,
        encoded_together=ENCODE_TOGETHER,
        compute_bytes=dtype.itemsize,
        nf4=options.get("quantize") == "nf4",
        new_share=float((torch.cat(grown) >= experts).float().mean()) if grown else None,
        learned=predicted_positions(model, batch) / sequences,
        on_cpu=True,
    )
    return Step(model, batch, read_shape(unbuilt.to(dtype), dtype.itemsize), run)


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_bytes(model: MoExtend, batch: Batch) -> tuple[Tensor, int]:
    """Returns the loss and the bytes of the storages that its graph keeps and that are no parameters."""
    own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in own:
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).loss
    return loss, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_predicted_memory_is_that_of_a_real_step(world: TinyWorld, parts: list[str], dtype: torch.dtype) -> None:
    step = make_step(world, parts, dtype)
    learning = [p for p in step.model.parameters() if p.requires_grad]
    optimizer, _ = build_optimizer(learning, OptimSpec(), total_steps=1)
    loss, activations = saved_bytes(step.model, step.batch)
    loss.backward()
    optimizer.step()
    weights = size([*step.model.parameters(), *step.model.buffers()])
    gradients = size([p.grad for p in learning if p.grad is not None])
    moments = size([value for state in optimizer.state.values() for value in state.values()])
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
    step = make_step(world, PARTS["extension"], torch.float32, quantize="nf4")
    predicted = memory(step.shape, step.run)
    assert predicted.weights == size([*step.model.parameters(), *step.model.buffers()])
    assert predicted.weights < 0.5 * memory(step.shape, replace(step.run, nf4=False)).weights
    _, activations = saved_bytes(step.model, step.batch)
    assert predicted.activations == pytest.approx(activations, rel=0.04)


def grouped_flops(left: Tensor, right: Tensor, offs: Tensor, *_: object, **__: object) -> int:
    """Counts a grouped product, which torch's counter does not know: rows past the last group are not computed."""
    rows, inner = int(offs[-1]), right.shape[1] if right.dim() == 3 else left.shape[0]
    return 2 * rows * inner * right.shape[-1]


grouped_flops._get_raw = True  # type: ignore[attr-defined] # hands over tensors where others get shapes


def counter() -> FlopCounterMode:
    aten = torch.ops.aten
    # The counter of torch 2.11 has no entry for attention on a CPU; its formula is the same everywhere.
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping={aten._grouped_mm: grouped_flops, **attention})


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
    with counter() as counted:
        step.model(step.batch).loss.backward()
    assert operations(step.shape, step.run).total == pytest.approx(counted.get_total_flops(), rel=0.02)
