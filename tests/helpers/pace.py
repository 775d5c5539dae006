"""Slows down the first start of a job, so that there is time to end it."""

from __future__ import annotations

import os
import time
from typing import Any

from lightning.pytorch import Callback, Trainer


class Pace(Callback):
    """Waits before each step.

    Args:
        seconds: To wait; 0 in a job that SLURM has started again.
        step: The first one before which it waits.
    """

    def __init__(self, seconds: float, step: int) -> None:
        self.seconds = 0.0 if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else seconds
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            time.sleep(self.seconds)
