"""What is logged of expert choice during training, against plain loops over what the routers said."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_world import EXPERTS, GROWN, TinyWorld, make_plan
from lightning.pytorch import Callback, Trainer

from callbacks.train_only import TrainOnly
from callbacks.usage_log import UsageLog, details, summary
from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.moe.blocks import list_blocks
from moextend_pl.runs.metrics_log import RunLogger

LEARNING = TrainOnly(["projector", "new_experts", "new_routers", "calibration"])
STEPS, EVERY, BATCHES = 4, 2, 2


class PlainCount(Callback):
    """Notes, token by token, what every router selects in each training step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[tuple[str, int], list[int]]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        for block in list_blocks(pl_module.language.model):
            block.router.register_forward_hook(self._hook(trainer, pl_module, block.layer, block.num_experts))

    def on_train_batch_start(self, trainer: Trainer, pl_module: MoExtend, batch: Any, batch_idx: int) -> None:
        marks = batch["input_ids"] == pl_module.language.image_token_id
        self.kinds = [
            None if not real else "image" if image else "text"
            for real, image in zip(batch["attention_mask"].flatten().tolist(), marks.flatten().tolist(), strict=True)
        ]

    def _hook(self, trainer: Trainer, module: MoExtend, layer: int, experts: int) -> Callable:
        def note(_router: object, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if not trainer.training:
                return
            counts = self.steps.setdefault(trainer.global_step + 1, {})
            for kind, chosen in zip(self.kinds, output[2].tolist(), strict=True):
                for expert in chosen if kind else ():
                    counts.setdefault((kind, layer), [0] * experts)[expert] += 1

        return note


def extended(world: TinyWorld, make_trainer: Callable, *callbacks: Callback, **options: Any) -> MoExtend:
    model = world.unbuilt()
    model.extension_plan = make_plan(routing="open")
    make_trainer(LEARNING, *callbacks, steps=STEPS, accumulate_grad_batches=BATCHES, **options).fit(
        model, world.datamodule("mixed")
    )
    return model


def test_counts_of_logged_steps_are_those_of_a_plain_loop_over_all_their_batches(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    plain = PlainCount()
    extended(tiny_world, make_trainer, plain, UsageLog(EVERY), logger=RunLogger(str(tmp_path / "run")))
    rows = [json.loads(line) for line in (tmp_path / "run" / "expert_usage.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        expected = plain.steps[row["step"]]
        for layer in range(3):
            experts = EXPERTS + (layer in GROWN)
            for kind in ("image", "text"):
                assert row["language"][kind][str(layer)] == expected.get((kind, layer), [0] * experts)
        assert row["new"] == {str(layer): 1 for layer in GROWN}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = {row["step"]: row for row in csv.DictReader(file) if row.get("language/entropy")}
    assert list(logged) == ["1", "3"]
    shares = []
    for layer in GROWN:
        counts = rows[-1]["language"]["image"][str(layer)]
        shares.append(counts[-1] / sum(counts))
    assert float(logged["3"]["language/new_image"]) == pytest.approx(sum(shares) / len(shares))


def test_watching_changes_nothing_that_is_learned(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    with_log = extended(tiny_world, make_trainer, UsageLog(1)).state_dict()
    without = extended(tiny_world, make_trainer).state_dict()
    assert all(torch.equal(value, without[name]) for name, value in with_log.items())


def test_what_counts_amount_to() -> None:
    even, one = torch.tensor([5, 5, 5, 5]), torch.tensor([0, 20, 0, 0])
    found = summary({"all": {0: even, 1: one}, "image": {0: torch.tensor([1, 1, 1, 5]), 1: one}, "text": {0: one}}, {})
    assert found == {"entropy": pytest.approx(0.5), "dead": pytest.approx(3 / 8), "overloaded": pytest.approx(1 / 8)}
    grown = summary({"all": {0: even}, "image": {0: torch.tensor([1, 1, 1, 5])}, "text": {0: one}}, {0: 1})
    assert grown["new_image"] == pytest.approx(5 / 8)
    assert grown["new_text"] == 0


def test_what_saw_no_token_is_not_called_dead() -> None:
    nothing, some = torch.zeros(4, dtype=torch.long), torch.tensor([1, 1, 1, 1])
    assert summary({"all": {0: nothing}, "image": {0: nothing}, "text": {0: nothing}}, {0: 1}) == {}
    found = summary({"all": {0: some, 1: nothing}, "image": {0: nothing}, "text": {0: some}}, {0: 1})
    assert found == {"entropy": pytest.approx(1.0), "dead": 0.0, "overloaded": 0.0, "new_text": pytest.approx(0.25)}


def test_a_part_alone_and_no_interval_are_refused(tiny_world: TinyWorld, make_trainer: Callable) -> None:
    with pytest.raises(UserError, match="at least 1, got 0"):
        UsageLog(0)
    model = tiny_world.language()
    with pytest.raises(UserError, match="watches a moextend_pl.MoExtend, got MoELanguageModel"):
        UsageLog().setup(make_trainer(steps=1), model, "fit")


def test_details_name_every_layer_and_expert() -> None:
    even, one, none = torch.tensor([5, 5]), torch.tensor([0, 15, 5]), torch.zeros(2, dtype=torch.long)
    counts = {"all": {0: even, 11: one}, "image": {0: none, 11: one}, "text": {0: even, 11: one}}
    whole = summary(counts, {11: 1})
    assert details(counts, {11: 1}, "parts") == whole
    layers = details(counts, {11: 1}, "layers")
    assert layers["layer_00/entropy"] == pytest.approx(1)
    assert layers["layer_11/new_image"] == pytest.approx(0.25)
    assert "layer_00/new_text" not in layers
    experts = details(counts, {11: 1}, "experts")
    shares = {"layer_00/expert_{:02d}/text": (0.5, 0.5), "layer_11/expert_{:02d}/image": (0, 0.75, 0.25)}
    shares["layer_11/expert_{:02d}/text"] = (0, 0.75, 0.25)
    assert {name: value for name, value in experts.items() if name not in layers} == {
        name.format(expert): value for name, values in shares.items() for expert, value in enumerate(values)
    }
    # Letters that MLflow takes, which takes the fewest.
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in experts)
