"""The progress bar knows the whole stage, also after an interruption."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_world import TinyWorld
from lightning.pytorch import Callback, Trainer

from callbacks import StageCheckpoint, StageProgress, StageSpeed, TrainOnly
from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.atomic import write_json
from moextend_pl.runs.manifest import ROAD_FILE
from moextend_pl.runs.metrics_log import RunLogger


class Stop(Callback):
    """Ends a run after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: MoExtend, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_bar_of_a_continued_stage_has_its_total_and_starts_where_the_stage_stopped(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    def trainer(bar: StageProgress, *more: Callback) -> Trainer:
        return make_trainer(
            TrainOnly(["projector"]), StageCheckpoint(2), bar, *more, steps=6, enable_checkpointing=True,
            enable_progress_bar=True,
        )  # fmt: skip

    first = trainer(StageProgress(), Stop(3))
    with pytest.raises(RuntimeError, match="killed"):
        first.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    bar = StageProgress()
    seen: list[tuple[int, int]] = []
    bar.on_train_batch_start = lambda *_: seen.append((bar.train_progress_bar.initial, bar.train_progress_bar.total))  # type: ignore[method-assign]
    trainer(bar).fit(
        tiny_world.unbuilt(), tiny_world.datamodule(), ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt",
        weights_only=True,
    )  # fmt: skip
    assert seen[0] == (2, 6)


def test_bar_of_one_of_several_stages_goes_on_where_the_one_before_ended(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir(exist_ok=True)
    write_json(tmp_path / "run" / ROAD_FILE, {"stage": "stage 3 of 4", "before": 10, "after": 5})
    bar = StageProgress(refresh_rate=1)
    seen: list[tuple[int, int, str]] = []
    bar.on_train_batch_start = lambda *_: seen.append(  # type: ignore[method-assign]
        (bar.train_progress_bar.n, bar.train_progress_bar.total, bar.train_progress_bar.desc)
    )
    trainer = make_trainer(TrainOnly(["projector"]), bar, steps=2, enable_progress_bar=True)
    trainer.fit(tiny_world.unbuilt(), tiny_world.datamodule())
    assert seen == [(10, 17, "stage 3 of 4: "), (11, 17, "stage 3 of 4: ")]
    assert bar.train_progress_bar.n == 12


class Batches(Callback):
    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: MoExtend, outputs: Any, batch: Any, *_: Any) -> None:
        shifted = batch["labels"][:, 1:] != -100
        self.shares.append(int(shifted.sum()) / int(batch["attention_mask"].sum()))


def test_speed_is_told_with_the_share_of_learned_tokens_and_of_the_card(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    batches, logger = Batches(), RunLogger(str(tmp_path / "run"))
    speed = StageSpeed(window_size=2, gflops_per_token=2.0, peak_tflops=4.0)
    make_trainer(TrainOnly(["projector"]), batches, speed, steps=4, logger=logger, log_every_n_steps=1).fit(
        tiny_world.unbuilt(), tiny_world.datamodule()
    )
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares = [float(row["train/supervised_share"]) for row in rows if row.get("train/supervised_share")]
    assert shares == pytest.approx(batches.shares)
    rates = [row for row in rows if row.get("train/device/mfu")]
    assert rates
    for row in rates:
        tokens = float(row["train/device/items_per_sec"])
        assert float(row["train/device/mfu"]) == pytest.approx(tokens * 2e9 / 4e12)


def test_speed_without_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="`peak_tflops` of StageSpeed above 0, got 0"):
        StageSpeed(peak_tflops=0)
