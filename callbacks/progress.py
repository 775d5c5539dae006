"""Progress of a stage with the time that is left."""

from __future__ import annotations

from lightning.pytorch.callbacks import TQDMProgressBar


class StageProgress(TQDMProgressBar):
    """Lightning's progress bar over the steps of the whole stage.

    Data is endless here and a stage has `max_steps`, so that the stock bar knows no total and no time left.
    """

    @property
    def total_train_batches(self) -> int:
        """Batches of the whole stage."""
        return int(self.trainer.max_steps * self.trainer.accumulate_grad_batches)
