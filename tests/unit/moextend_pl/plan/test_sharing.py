"""Memory of a rank that shares weights: that of a model which is sharded over so many ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.real_steps import make_step, size
from helpers.stages import write_stage
from helpers.tiny_world import TinyWorld, build_tiny_world, make_plan, tiny_mixtral, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from moextend_pl import cli
from moextend_pl.moe.blocks import decoder_layers
from moextend_pl.plan import cost
from moextend_pl.plan.sharing import memory, received_bytes
from moextend_pl.runs.sharded import local
from moextend_pl.training.optim import OptimSpec, build_optimizer
from moextend_pl.training.sharding.units import shard, share_experts

RANKS = 4
PARTS = {
    "extension": ["projector", "new_experts", "new_routers", "calibration"],
    "everything": ["projector", "language", "routers"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny world all of whose weights divide by the number of ranks."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"))
    tiny_mixtral(len(tiny_tokenizer()) + -len(tiny_tokenizer()) % RANKS, num_hidden_layers=4).save_pretrained(
        world.base
    )
    return world


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_predicted_memory_is_that_of_a_sharded_model(world: TinyWorld, parts: list[str], dtype: torch.dtype) -> None:
    step = make_step(world, parts, dtype)
    layer = max(size(list(each.parameters())) for each in decoder_layers(step.model.language.model))
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        shard(step.model.language.model, init_device_mesh("cpu", (RANKS,)))
        learning = [p for p in step.model.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
        optimizer, _ = build_optimizer(learning, OptimSpec(), total_steps=1)
        optimizer.step()
    finally:
        dist.destroy_process_group()
    predicted = memory(step.shape, replace(step.run, gpus=RANKS, shared_by=RANKS))
    held = [local(tensor) for tensor in (*step.model.parameters(), *step.model.buffers())]
    assert predicted.weights == size(held)
    assert predicted.gradients == size([local(p.grad) for p in learning if p.grad is not None])
    states = [local(value) for state in optimizer.state.values() for value in state.values()]
    assert predicted.optimizer == size(states)
    assert predicted.gathered >= 2 * layer
    assert predicted.activations == cost.memory(step.shape, step.run).activations


def test_predicted_memory_is_that_of_a_model_whose_experts_are_shared(world: TinyWorld) -> None:
    step = make_step(world, PARTS["extension"], torch.float32)
    whole = size(list(step.model.parameters()))
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        share_experts(step.model.language.model, init_device_mesh("cpu", (RANKS,)))
    finally:
        dist.destroy_process_group()
    run = replace(step.run, gpus=RANKS, shared_by=RANKS, shares_experts=True)
    predicted, alone = memory(step.shape, run), cost.memory(step.shape, step.run)
    held = [local(tensor) for tensor in (*step.model.parameters(), *step.model.buffers())]
    assert predicted.weights == size(held) < whole
    assert (predicted.gradients, predicted.optimizer) == (alone.gradients, alone.optimizer)
    assert predicted.activations > alone.activations
    assert predicted.temporaries > alone.temporaries


def test_each_layer_is_received_for_each_pass(world: TinyWorld) -> None:
    step = make_step(world, ["projector"], torch.float32)
    layers = size([p for layer in decoder_layers(step.model.language.model) for p in layer.parameters()])
    run = replace(step.run, gpus=2, shared_by=2)
    around = sum(part.cut for part in step.shape.parts) - layers
    assert received_bytes(step.shape, run) == run.accumulate * (layers + around)  # half of all, forward and backward
    assert received_bytes(step.shape, replace(run, shared_by=1)) == 0


def test_plan_counts_what_a_rank_of_a_sharded_run_holds(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan().save(tmp_path / "plan.yaml")
    config = write_stage(world, tmp_path / "run", "extend", plan=tmp_path / "plan.yaml")
    command = ["plan", "--config", str(config), "--length=64", "--trainer.devices=4"]
    assert cli.main([*command, "--trainer.strategy=fsdp2"]) == 0
    text = capsys.readouterr().out
    assert "weights are shared by 4 GPUs: each receives " in text
    assert "gathered layers" in text
    two = "{class_path: moextend_pl.ShardedStrategy, init_args: {copies: 2}}"
    assert cli.main([*command, f"--trainer.strategy={two}"]) == 0
    assert "weights are shared by 2 GPUs" in capsys.readouterr().out
    assert cli.main([*command, "--trainer.strategy=expert_parallel"]) == 0
    assert "experts of the base are shared by 4 GPUs: each receives " in capsys.readouterr().out
    assert cli.main([*command, "--trainer.strategy=ddp"]) == 0
    assert "shared" not in capsys.readouterr().out
    assert cli.main([*command, "--trainer.strategy=fsdp2", "--model.language.compute.quantize=nf4"]) == 2
    assert "A base in 4 bits" in capsys.readouterr().err
