"""The progress bar knows the whole stage, also after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_world import TinyWorld
from lightning.pytorch import Callback, Trainer

from callbacks import StageCheckpoint, StageProgress, TrainOnly
from moextend_pl.models.moextend import MoExtend


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
