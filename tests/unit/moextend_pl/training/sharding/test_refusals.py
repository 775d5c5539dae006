"""What cannot be sharded is refused before a weight is read, with what can be done."""

from __future__ import annotations

import pytest
from helpers.tiny_world import TinyWorld
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks.outputs import SavePretrained
from moextend_pl.contracts import TrainPlan, UserError
from moextend_pl.models.base_model import ComputeSpec
from moextend_pl.models.encoder import VisionEncoder
from moextend_pl.models.language import MoELanguageModel
from moextend_pl.training.sharding.strategy import ShardedStrategy


def attached(module: LightningModule, strategy: ModelParallelStrategy) -> LightningModule:
    module._trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=1, logger=False)
    return module


@pytest.mark.parametrize(
    ("compute", "words"),
    [({"quantize": "nf4"}, "A base in 4 bits .* Use `trainer.strategy: ddp`"), ({"compile": True}, "not compiled")],
)
def test_base_that_cannot_be_cut_is_refused(tiny_world: TinyWorld, compute: dict, words: str) -> None:
    module = MoELanguageModel(base=str(tiny_world.base), compute=ComputeSpec(**compute))
    with pytest.raises(UserError, match=words):
        attached(module, ShardedStrategy()).setup("fit")


@pytest.mark.parametrize(
    ("options", "parts", "words"),
    [
        ({"dense": True}, ("projector",), "a language model that is dense or upcycled. Use `trainer.strategy: fsdp2`"),
        ({}, ("language",), "and here they learn. Use `trainer.strategy: fsdp2`"),
        ({}, None, "and here they learn"),
        ({"compute": ComputeSpec(experts_implementation="eager")}, ("routers",), "got `experts_implementation: eager`"),
        ({"compute": ComputeSpec(quantize="nf4")}, ("routers",), "A base in 4 bits"),
    ],
)
def test_base_whose_experts_cannot_be_shared_is_refused(
    tiny_world: TinyWorld, options: dict, parts: tuple[str, ...] | None, words: str
) -> None:
    module = attached(MoELanguageModel(base=str(tiny_world.base), **options), ShardedStrategy(share="experts"))
    module.train_plan = parts and TrainPlan(parts)
    with pytest.raises(UserError, match=words):
        module.setup("fit")


def test_tower_alone_has_nothing_to_shard(tiny_world: TinyWorld) -> None:
    tower = VisionEncoder(path=str(tiny_world.encoder), tokenizer=str(tiny_world.base))
    with pytest.raises(UserError, match="VisionEncoder has no language model"):
        attached(tower, ShardedStrategy()).setup("fit")


def test_whole_model_is_not_written_by_processes_that_hold_parts(tiny_world: TinyWorld) -> None:
    module = attached(MoELanguageModel(base=str(tiny_world.base)), ShardedStrategy())
    with pytest.raises(UserError, match="SavePretrained writes a whole model, .* Use `trainer.strategy: ddp`"):
        SavePretrained("base").setup(module.trainer, module, "fit")


def test_lightnings_own_strategy_is_refused_where_nothing_exchanges_it(tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="ModelParallelStrategy does not share gradients here. Use `moextend_pl.Shard"):
        attached(tiny_world.unbuilt(), ModelParallelStrategy()).setup("fit")


@pytest.mark.parametrize(("copies", "devices"), [(0, 2), (2, 2), (3, 4)])
def test_processes_that_do_not_divide_into_copies_are_refused(copies: int, devices: int) -> None:
    strategy = ShardedStrategy(copies=copies)
    Trainer(strategy=strategy, accelerator="cpu", devices=devices, max_steps=1, logger=False)
    with pytest.raises(UserError, match=f"divide into {copies} copies of several each, got {devices}"):
        strategy.setup_environment()
