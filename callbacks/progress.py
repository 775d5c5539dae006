"""Progress of a stage with the time that is left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from moextend_pl.contracts import run_directory
from moextend_pl.runs.atomic import read_json
from moextend_pl.runs.manifest import ROAD_FILE


class StageProgress(TQDMProgressBar):
    """Lightning's progress bar over the steps of the whole stage, or of all stages where a command runs them in a row.

    Data is endless here and a stage has `max_steps`, so that the stock bar knows no total and no time left.
    """

    _before = 0

    @property
    def total_train_batches(self) -> int:
        """Batches of the whole stage."""
        return int(self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Shows the total from the start, also where a run goes on in the middle of Lightning's epoch."""
        super().on_train_start()
        self._place(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keeps it, where Lightning would begin anew."""
        super().on_train_epoch_start(trainer)
        self._place(trainer)

    def _place(self, trainer: Trainer) -> None:
        road, batches = read_json(run_directory(trainer) / ROAD_FILE), trainer.accumulate_grad_batches
        self._before = int(road.get("before", 0)) * batches
        bar = self.train_progress_bar
        bar.total = self._before + self.total_train_batches + int(road.get("after", 0)) * batches
        # Steps of the earlier start, and those of other stages, were not taken at this speed.
        bar.n = bar.initial = self._before + trainer.global_step * batches
        bar.set_description(str(road.get("stage") or "Training"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts from the first stage on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, self._before + batch_idx)
