"""SIGTERM in a run of several processes: all of them end together, whichever was told."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


class EndTogether(Callback):
    """Ends all ranks at the start of a batch once any of them was told to end.

    Lightning's own handler talks to the other ranks inside of the handler, where they stand at another place: a run
    of which one rank is told hangs. Here the handler only makes a note, which ranks exchange before each batch. Runs
    of one process keep Lightning's handler.
    """

    def __init__(self) -> None:
        self._told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens; Lightning's handler is there by now."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning puts back what was there before the run

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run if a rank was told."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._told, all=False):
            raise SIGTERMException

    # Lightning calls its hooks by place.
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start  # type: ignore[assignment]

    def _note(self, *_: object) -> None:
        self._told = True
