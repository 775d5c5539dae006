"""Writes down which step each rank has taken last."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from moextend_pl.contracts import run_directory


class LastStep(Callback):
    """Writes `rank_N.txt` after each step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        (run_directory(trainer) / f"rank_{trainer.global_rank}.txt").write_text(str(trainer.global_step))
