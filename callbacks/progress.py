"""Progress of a stage with the time that is left."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class StageProgress(TQDMProgressBar):
    """Lightning's progress bar over the steps of the whole stage.

    Data is endless here and a stage has `max_steps`, so that the stock bar knows no total and no time left.
    """

    @property
    def total_train_batches(self) -> int:
        """Batches of the whole stage."""
        return int(self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the total from the start, also where a run goes on in the middle of Lightning's epoch."""
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.total = self.total_train_batches
        # Steps of the earlier start were not taken at this speed.
        self.train_progress_bar.initial = trainer.global_step * trainer.accumulate_grad_batches
        self.train_progress_bar.refresh()
