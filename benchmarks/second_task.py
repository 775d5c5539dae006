"""Does a second extension leave the first as it was? Backward transfer of masked and open routing on easy-VQA.

    python benchmarks/second_task.py --base runs/quickstart --out runs/second_task

Task A is the questions of easy-VQA about shapes, task B those about colours. Starting from the aligned model of a
finished quickstart, the model is extended for A, then, on top and with A frozen, for B. Both are evaluated on the
official test questions, with the plans' masks (`masked`, by task) and with every expert open to every token (`open`).
Prints a table and writes `second_task.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from datamodules import ImageTextShards
from datamodules.easy_vqa import COLOURS, Picture, pictures_of, vqa_entries
from datamodules.mixture import ShardSet
from datamodules.options import RowSpec
from datamodules.sets import SPLITS
from datamodules.shards import write_shards
from moextend_pl import MoExtend, cli
from moextend_pl.contracts import ExtensionPlan
from moextend_pl.runs.atomic import write_json

ROOT = Path(__file__).parents[1]
TASKS = ("shape", "colour")
ROUTINGS = ("masked", "open")


def task_of(question: str) -> str:
    """Returns the task that a question of easy-VQA belongs to."""
    words = set(re.findall(r"[a-z]+", question))
    return "colour" if words & {"color", *COLOURS} else "shape"


def pictures_with(task: str, pictures: list[Picture]) -> Iterator[Picture]:
    """Yields the pictures with the questions of one task only."""
    for picture in pictures:
        questions = tuple(pair for pair in picture.questions if task_of(pair[0]) == task)
        if questions:
            yield dataclasses.replace(picture, questions=questions)


def build_sets(out: Path, limit: int | None = None) -> None:
    """Writes `data/<task>/<split>` unless they are there, of the first `limit` pictures of each split."""
    package = importlib.import_module("easy_vqa")
    for split in SPLITS:
        for task in TASKS:
            folder = out / "data" / task / split
            if not (folder / "index.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write_shards(vqa_entries(pictures_with(task, pictures_of(package, split)[:limit])), folder, 1000)


def extend(base: Path, out: Path, task: str, start: Path, steps: int) -> Path:
    """Runs one extend stage and returns its run directory."""
    run, plan_file = out / task, out / f"{task}_plan.yaml"
    plan = ExtensionPlan.load(base / "2_probe" / "extension_plan.yaml")
    replace(plan, task=task, report={}).save(plan_file)
    # The projector is a part of the first task: if it learned again, what the first task sees would change.
    parts = ["new_experts", "new_routers", "calibration"] + (["projector"] if task == TASKS[0] else [])
    callbacks = {
        "TrainOnly": {"parts": parts},
        "ExpertExtension": {"plan": str(plan_file)},
        "FrozenGuard": {},
        "SaveDelta": {},
        "StageReceipt": {"outputs": ["delta.safetensors", "manifest.json", "frozen.json"]},
    }
    stage: dict[str, Any] = {
        "base": str(ROOT / "configs" / "easy_vqa" / "vqa.yaml"),
        "trainer": {
            "default_root_dir": str(run),
            "max_steps": steps,
            "callbacks+": [{"class_path": f"callbacks.{name}", "init_args": args} for name, args in callbacks.items()],
        },
        "model": {
            "init_args": {
                "init_from": str(start),
                "encoder": {"path": str(base / "0_vision" / "encoder")},
                "language": {"base": str(base / "0_language" / "base")},
                "optim": {"lr": 2e-3},
            }
        },
        "data": {
            "init_args": {split: {"path": str(out / "data" / task / split), "task": task} for split in ("train", "val")}
        },
    }
    config = out / f"{task}.yaml"
    config.write_text(yaml.safe_dump(stage, sort_keys=False))
    cli.run(["fit", "--config", str(config)])
    return run


def test_data(out: Path, model: MoExtend) -> ImageTextShards:
    """Returns the official test questions of both tasks."""
    sets = {task: ShardSet(str(out / "data" / task / "test"), task=task) for task in TASKS}
    return ImageTextShards(test=sets, rows=RowSpec(turns="single"), batch_size=500, spec=model.sample_spec())


def evaluate(out: Path, model: MoExtend) -> dict[str, dict[str, float]]:
    """Returns accuracies by routing and task."""
    result = {}
    for routing in ROUTINGS:
        model.language.open_to_text(routing == "open")
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, devices=1)
        rows = trainer.test(model, datamodule=test_data(out, model), verbose=False)
        metrics = {name.split("/dataloader")[0]: value for row in rows for name, value in row.items()}
        result[routing] = {task: float(metrics[f"test/{task}_accuracy"]) for task in TASKS}
    model.language.open_to_text(False)
    return result


@torch.no_grad()
def outputs_identical(out: Path, first: MoExtend, second: MoExtend) -> bool:
    """Returns whether all logits of all test prompts of task A are `torch.equal` before and after B."""
    data = test_data(out, first)
    data.setup("test")
    same = True
    for batch in data.test_dataloader()[0]:
        same = same and torch.equal(
            first.language(batch, first.embed(batch)), second.language(batch, second.embed(batch))
        )
    return same


def main(argv: list[str] | None = None) -> None:
    """Runs both extensions and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/second_task"))
    parser.add_argument("--steps", type=int, default=900, help="steps of each extension")
    parser.add_argument("--pictures", type=int, help="pictures of each split; all by default")
    options = parser.parse_args(argv)
    base, out = options.base.resolve(), options.out.resolve()
    build_sets(out, options.pictures)
    run_a = extend(base, out, TASKS[0], base / "1_align", options.steps)
    run_b = extend(base, out, TASKS[1], run_a, options.steps)
    first, second = MoExtend.load(run_a), MoExtend.load(run_b)
    before, after = evaluate(out, first), evaluate(out, second)
    report = {
        "steps": options.steps,
        "after_shape": before,
        "after_shape_and_colour": after,
        "shape_outputs_identical": outputs_identical(out, first, second),
        "backward_transfer": {routing: after[routing]["shape"] - before["masked"]["shape"] for routing in ROUTINGS},
    }
    write_json(out / "second_task.json", report)
    lines = ["| model | routing | shape questions | colour questions |", "|---|---|---|---|"]
    for name, numbers in (("extended for shapes", before), ("then for colours", after)):
        lines += [f"| {name} | {r} | {numbers[r]['shape']:.4f} | {numbers[r]['colour']:.4f} |" for r in ROUTINGS]
    print("\n".join(lines))
    print(f"shape logits bit-identical after the second extension: {report['shape_outputs_identical']}")
    print(json.dumps(report["backward_transfer"]))


if __name__ == "__main__":
    sys.exit(main())
