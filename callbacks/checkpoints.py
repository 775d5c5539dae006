"""The newest states of a run, to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from moextend_pl.contracts import run_directory
from moextend_pl.runs.checkpoint import CHECKPOINT_FOLDER, PENDING_CHECKPOINT, check_room, take_place

MOMENTS, MASTER = 8, 4  # bytes of an optimizer for each number that learns


class StageCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt` up to date while a stage trains, but not at its last step.

    The one before stays as `previous.ckpt`, from which a run goes on if the last one is damaged.

    A run that is killed while it writes its results must train its last steps again and write them; a
    checkpoint of the last step would tell Lightning that nothing is left to do. `StageReceipt` saves
    the final state when all results are there.

    Lightning logs a step's metrics when all callbacks have seen its end, and those of a validation that follows it
    later still. A new checkpoint therefore takes its place only when both are done: a run that is killed in between
    takes the steps since the checkpoint before again, validates again and loses no row.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    FILE_EXTENSION = Path(PENDING_CHECKPOINT).suffix

    def __init__(self, every_n_steps: int = 100) -> None:
        super().__init__(
            filename=Path(PENDING_CHECKPOINT).stem,
            every_n_train_steps=every_n_steps,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts checkpoints into the run directory, where Lightning would take the first logger's."""
        self.dirpath = str((run_directory(trainer) / CHECKPOINT_FOLDER).absolute())
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a disk without room for the checkpoints, before the first step."""
        super().on_train_start(trainer, pl_module)
        learning = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        # As `build_optimizer` decides: one half-precision weight, and all have a copy in 32 bits.
        masters = MASTER * any(parameter.element_size() == 2 for parameter in learning)
        size = sum(parameter.numel() * (parameter.element_size() + MOMENTS + masters) for parameter in learning)
        check_room(Path(str(self.dirpath)), size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, unless the stage is at its end."""
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _take_place(self, trainer: Trainer) -> None:
        newest = Path(self.best_model_path)
        if trainer.is_global_zero and self.best_model_path and newest.exists():
            take_place(newest)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Puts the checkpoint of the step before in its place."""
        self._take_place(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the checkpoint of the last step in its place."""
        self._take_place(trainer)
