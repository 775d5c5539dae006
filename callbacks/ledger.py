"""Writes down which samples each training batch held."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from moextend_pl.contracts import Batch, run_directory
from moextend_pl.runs.atomic import write_text

LEDGER_FILE = "ledger.jsonl"


class SampleLedger(Callback):
    """Writes `ledger.jsonl`: for each global batch its number, counted over restarts, and the keys of its samples.

    A line is written when its step is done. A run that goes on from a checkpoint first takes back the lines of
    the batches that it trains again, so that the file tells what the saved weights have seen. Ranks are gathered
    at every batch, which costs time: for tests, and for finding out what a run was shown.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes back the lines that are not part of the state the run starts from."""
        if not trainer.is_global_zero:
            return
        path = run_directory(trainer) / LEDGER_FILE
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(lines[: _batches(trainer)]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Adds the line of a batch."""
        shares: list[Any] = [batch["keys"]]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            dist.all_gather_object(shares, batch["keys"])
        if trainer.is_global_zero:
            row = {"batch": _batches(trainer) - 1, "keys": [key for share in shares for key in share]}
            with (run_directory(trainer) / LEDGER_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _batches(trainer: Trainer) -> int:
    """Returns how many batches were trained, over all restarts."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)
