"""Stages under FSDP2, HSDP and expert parallelism take the steps of one process, and go on under other strategies."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.ranks import Round, run_rounds
from helpers.stages import PARTS, metrics, write_stage
from helpers.tiny_world import TinyWorld, make_plan, perturb
from safetensors.torch import load_file

from moextend_pl import cli
from moextend_pl.contracts import ExtensionPlan, TrainPlan, UpcycleSpec
from moextend_pl.models.delta import save_delta
from moextend_pl.models.moextend import MoExtend

pytestmark = pytest.mark.slow
STEPS = 20
# So small that AdamW, which divides a gradient by its own size, makes no difference of one that is rounding.
OPTIONS = ("--model.optim.lr=1e-4", "--model.optim.schedule=constant", "--model.optim.warmup_fraction=0")
ONE, FSDP2 = ("--trainer.devices=1",), ("--trainer.strategy=fsdp2",)
HSDP = ("--trainer.strategy={class_path: moextend_pl.ShardedStrategy, init_args: {copies: 2}}",)
EXPERTS = ("--trainer.strategy=expert_parallel",)
EXPERTS_COPIED = (
    "--trainer.strategy={class_path: moextend_pl.ShardedStrategy, init_args: {copies: 2, share: experts}}",
)
# stage -> options of its own
STAGES: dict[str, tuple[str, ...]] = {
    "align": ("--trainer.gradient_clip_val=0.05",),
    "probe": (),
    "extend": ("--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.5"),
    "second": ("--model.language.compute.activation_checkpointing=true",),
    "instruction": ("--model.optim.weight_decay=0.1",),
}
FROZEN_BASE = tuple(stage for stage in STAGES if stage != "instruction")
# Four processes take every stage where that is asked for; it takes five minutes more.
OF_FOUR = {"four": HSDP, "experts of four": EXPERTS}
ON_FOUR = [(way, "extend") for way in OF_FOUR]
if os.environ.get("MOEXTEND_EVERY_STAGE"):
    OF_FOUR["layers of four"] = FSDP2
    ON_FOUR = [(w, stage) for w in OF_FOUR for stage in (FROZEN_BASE if OF_FOUR[w] == EXPERTS else STAGES)]
HALF = "extend_half"
# The norm that is clipped to is rounded to the type of the gradients by torch, and is not by us.
IN_HALF = ("--trainer.precision=bf16-true", "--trainer.gradient_clip_val=0")


class Runs:
    """Run directories of stages by the way they were run."""

    def __init__(self, world: TinyWorld, root: Path) -> None:
        self.world, self.root = world, root
        first = make_plan(sources=(1, 2), init="copy", routing="masked")
        first.save(root / "extend.yaml")
        make_plan((0, 1), sources=(0,), routing="masked").save(root / "second.yaml")
        # Off their start, where a new expert ties with its source.
        grown = self._start("extend", world.model(first, PARTS["extend"]))
        spec = UpcycleSpec(experts=4, top_k=2)
        upcycled = world.cumo(encoder=spec, projector=spec, language=spec)
        upcycled.train_plan = TrainPlan(tuple(PARTS["instruction"]))
        upcycled.configure_model()
        self.starts = {
            "extend": grown,
            "second": grown,
            HALF: grown,
            "instruction": self._start("instruction", upcycled),
        }

    def _start(self, stage: str, model: MoExtend) -> Path:
        perturb([p for name in PARTS[stage] for p in model.parts()[name]], size=0.1)
        save_delta(model, self.root / f"start_{stage}")
        return self.root / f"start_{stage}"

    def continued(self, way: str, other: str, *options: str) -> list[str]:
        """Returns the command that takes the second half of an extension, from what another way has saved half way."""
        saved = self.run("extend", way) / "checkpoints" / "previous.ckpt"
        return self.command("extend", f"{way} then {other}", f"--ckpt_path={saved}", *options)

    def command(self, stage: str, way: str, *options: str) -> list[str]:
        """Writes the config of a stage and returns the command that runs it."""
        kind, run = {"second": "extend", HALF: "extend"}.get(stage, stage), self.run(stage, way)
        plan = self.root / f"{'second' if stage == 'second' else 'extend'}.yaml"
        start = self.starts.get(stage)
        path = write_stage(self.world, run, kind, plan=plan, init_from=start, steps=STEPS, every=STEPS // 2)
        if stage == "second":
            path.write_text(path.read_text().replace("init: copy", "init: preserving"))
        return ["fit", "--config", str(path), *OPTIONS, *STAGES.get(stage, ()), *options]

    def test_command(self, stage: str, way: str, *options: str) -> list[str]:
        """Returns the command that lets the model of a stage answer, whose config is written."""
        tested = (f"--data.test={{mixed: {self.world.data('mixed', 'test')}}}", "--data.evaluation.batch_size=2")
        save = "--trainer.callbacks+=callbacks.WritePredictions"
        return ["test", "--config", str(self.root / way / f"{stage}.yaml"), *OPTIONS, *tested, save, *options]

    def answers(self, stage: str, way: str) -> list[dict]:
        """Returns what was answered, in the order of the questions' names."""
        files = self.run(stage, way).glob("predictions_mixed*.jsonl")
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return sorted(rows, key=lambda row: (row["key"], row["prompt"]))

    def run(self, stage: str, way: str) -> Path:
        """Returns the directory of a run."""
        return self.root / way / stage

    def parameters(self, stage: str) -> int:
        """Returns the number of numbers in the base, which no checkpoint holds."""
        base = self.world.dense if stage == "instruction" else self.world.base
        return sum(value.numel() for value in load_file(base / "model.safetensors").values())

    def saved(self, stage: str, way: str) -> dict:
        """Returns the last checkpoint of a run."""
        return torch.load(self.run(stage, way) / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def runs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All stages on one process and on two that share weights, and second halves of a run in another way."""
    found = Runs(tiny_world, tmp_path_factory.mktemp("sharded"))
    for stage in STAGES:
        cli.run(found.command(stage, "one", *ONE))
    cli.run(found.test_command("extend", "one", *ONE))
    two = ["--trainer.devices=2"]
    rounds: list[Round] = [
        (
            2,
            [
                *(found.command(stage, "two", *two, *FSDP2) for stage in STAGES),
                found.test_command("extend", "two", *two, *FSDP2),
                found.command(HALF, "two", *IN_HALF, *two, *FSDP2),
                found.command(HALF, "ddp", *IN_HALF, *two, "--trainer.strategy=ddp"),
                found.continued("one", "two", *two, *FSDP2),
                found.continued("one", "experts", *two, *EXPERTS),
                *(found.command(stage, "experts", *two, *EXPERTS) for stage in FROZEN_BASE),
                found.test_command("extend", "experts", *two, *EXPERTS),
            ],
        ),
        (
            4,
            [
                *(found.command(stage, way, "--trainer.devices=4", *OF_FOUR[way]) for way, stage in ON_FOUR),
                found.continued("two", "copies of experts", "--trainer.devices=4", *EXPERTS_COPIED),
            ],
        ),
        (2, [found.continued("experts of four", "two", *two, *FSDP2)]),
    ]
    run_rounds(rounds, found.root)
    cli.run(found.continued("two", "one", *ONE))
    return found


def validated(run: Path) -> list[float]:
    """Returns the losses of all validations of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


def assert_same(runs: Runs, stage: str, way: str, begin: int = 0) -> None:
    expected, got = (metrics(runs.run(stage, each)) for each in ("one", way))
    assert list(expected) == list(range(STEPS))
    assert list(got) == list(range(begin, STEPS))
    for step, values in got.items():
        assert values == pytest.approx(expected[step], abs=1e-5), f"step {step}"
    assert validated(runs.run(stage, way))[-1:] == pytest.approx(validated(runs.run(stage, "one"))[-1:], abs=1e-5)


@pytest.mark.parametrize("stage", list(STAGES))
def test_losses_of_two_processes_that_share_weights_are_those_of_one(runs: Runs, stage: str) -> None:
    assert_same(runs, stage, "two")


@pytest.mark.parametrize("stage", FROZEN_BASE)
def test_losses_of_two_processes_that_share_experts_are_those_of_one(runs: Runs, stage: str) -> None:
    assert_same(runs, stage, "experts")


@pytest.mark.parametrize(("way", "stage"), ON_FOUR)
def test_losses_of_four_processes_are_those_of_one(runs: Runs, way: str, stage: str) -> None:
    assert_same(runs, stage, way)


@pytest.mark.parametrize(
    "way",
    ["one then two", "two then one", "one then experts", "two then copies of experts", "experts of four then two"],
)
def test_run_goes_on_under_another_strategy_as_if_it_had_not_changed(runs: Runs, way: str) -> None:
    assert_same(runs, "extend", way, begin=STEPS // 2)


LEFT = [("two", stage) for stage in STAGES] + [("experts", stage) for stage in FROZEN_BASE]


@pytest.mark.parametrize(("way", "stage"), [each for each in LEFT if each[1] != "probe"])
def test_what_is_left_behind_is_that_of_one_process(runs: Runs, way: str, stage: str) -> None:
    deltas = [load_file(runs.run(stage, each) / "delta.safetensors") for each in ("one", way)]
    assert deltas[0].keys() == deltas[1].keys()
    for name, value in deltas[0].items():
        assert (deltas[1][name] - value).float().square().mean().sqrt() < 1e-5, name
    one, two = (json.loads((runs.run(stage, each) / "manifest.json").read_text()) for each in ("one", way))
    assert {key for key in one if one[key] != two[key]} == {"delta_sha256"}
    receipts = [json.loads((runs.run(stage, each) / "frozen.json").read_text()) for each in ("one", way)]
    assert receipts[0] == receipts[1]
    assert receipts[0]["unchanged"]


@pytest.mark.parametrize("way", ["two", "experts"])
def test_probe_chooses_the_layers_of_one_process_and_puts_its_routers_back(runs: Runs, way: str) -> None:
    plans = [ExtensionPlan.load(runs.run("probe", each) / "extension_plan.yaml") for each in ("one", way)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].report["scores"] == pytest.approx(plans[1].report["scores"], abs=1e-6)
    saved, base = runs.saved("probe", way), load_file(runs.world.base / "model.safetensors")
    routers = [value for name, value in saved["state_dict"].items() if "gate" in name]
    assert len(routers) == 3
    assert all(any(r.shape == t.shape and torch.equal(r, t) for t in base.values()) for r in routers)


@pytest.mark.parametrize(("way", "stage"), [*LEFT, ("two", HALF)])
def test_checkpoint_is_the_file_of_one_process(runs: Runs, way: str, stage: str) -> None:
    one, two = runs.saved(stage, "ddp" if stage == HALF else "one"), runs.saved(stage, way)
    shapes = [{name: (t.shape, t.dtype) for name, t in saved["state_dict"].items()} for saved in (one, two)]
    assert shapes[0] == shapes[1]
    learned, whole = sum(t.numel() for t in one["state_dict"].values()), runs.parameters(stage)
    assert stage == "instruction" or learned < whole / 2
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, values in first["state"].items():
        for name, value in values.items():
            other = second["state"][number][name]
            assert (other.shape, other.dtype) == (value.shape, value.dtype)
            assert (other - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize("way", ["two", "experts"])
def test_answers_are_those_of_one_process(runs: Runs, way: str) -> None:
    answers = [runs.answers("extend", each) for each in ("one", way)]
    assert len(answers[0]) > 10
    assert len({row["prediction"] for row in answers[0]}) > 1
    assert answers[0] == answers[1]


def test_losses_of_half_precision_are_those_of_ddp(runs: Runs) -> None:
    ddp, two = (list(metrics(runs.run(HALF, way)).values()) for way in ("ddp", "two"))
    for values, others in zip(ddp, two, strict=True):
        assert others == pytest.approx(values, abs=1e-5)
