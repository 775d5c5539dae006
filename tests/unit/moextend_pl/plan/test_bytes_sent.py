"""Bytes of a step as `plan` counts them are those that two processes receive from each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.ranks import run_rounds
from helpers.stages import write_stage
from helpers.tiny_world import TinyWorld, build_tiny_world, make_plan, tiny_mixtral, tiny_tokenizer

from moextend_pl.plan.cost import RunShape
from moextend_pl.plan.facts import ModelShape
from moextend_pl.plan.run_shape import Wishes, run_shape
from moextend_pl.plan.shapes import read_shape
from moextend_pl.plan.sharing import ranks_met, received_bytes, reduced_bytes
from moextend_pl.plan.stage_model import read_stage

STRATEGIES = ("ddp", "fsdp2", "expert_parallel")
STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extend stage of half of eight experts each, on two processes under each strategy."""
    root = tmp_path_factory.mktemp("sent")
    world: TinyWorld = build_tiny_world(root / "world")
    words = len(tiny_tokenizer()) + len(tiny_tokenizer()) % 2
    sizes = {"num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 4}
    tiny_mixtral(words, **sizes).save_pretrained(world.base)
    make_plan((1, 3), sources=(0,), routing="open").save(root / "plan.yaml")
    commands = []
    for strategy in STRATEGIES:
        config = write_stage(world, root / strategy, "extend", plan=root / "plan.yaml", steps=STEPS, every=STEPS)
        count = "--trainer.callbacks+=helpers.counted_bytes.CountedBytes"
        options = ["--allow-class-path", "helpers", "--trainer.devices=2", f"--trainer.strategy={strategy}", count]
        commands.append(["fit", "--config", str(config), *options])
    run_rounds([(2, commands)], root)
    return root


def planned(root: Path, strategy: str) -> tuple[ModelShape, RunShape]:
    options = ["--config", str(root / f"{strategy}.yaml"), "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    stage = read_stage(options)
    shape = read_shape(stage.module, stage.compute_dtype.itemsize, stage.mixed)
    return shape, run_shape(stage.config, Wishes(length=64), shape, compute_bytes=stage.compute_dtype.itemsize)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_of_a_step_are_those_that_are_received(runs: Path, strategy: str) -> None:
    shape, run = planned(runs, strategy)
    ranks = [json.loads((runs / strategy / f"received_{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]) == STEPS
    for steps in zip(*ranks, strict=True):
        # What one receives the other one sends, and has as many tokens of its own to send as it has.
        counted = sum(sum(step["bytes"].values()) for step in steps) / 2
        tokens = sum(step["tokens"] for step in steps) / 2
        now = replace(run, micro_batch=1, length=tokens, accumulate=1)
        shared = received_bytes(shape, now) if run.shared_by > 1 else 0.0
        assert counted == pytest.approx(shared + reduced_bytes(shape, now), rel=0.1)
        assert strategy == "ddp" or shared > 0


@pytest.mark.parametrize(("experts", "ranks", "chosen", "met"), [(4, 2, 2, 5 / 3), (8, 8, 2, 2.0), (8, 2, 1, 1.0)])
def test_ranks_that_a_token_meets_are_those_of_all_choices(experts: int, ranks: int, chosen: int, met: float) -> None:
    assert ranks_met(experts, ranks, chosen) == pytest.approx(met)
    assert ranks_met(experts, ranks, chosen - 0.5) == pytest.approx(
        (ranks_met(experts, ranks, chosen) + ranks_met(experts, ranks, chosen - 1)) / 2
    )
