"""Trains on two processes whose loaders hold different numbers of batches; a script, started as the first of them.

Arguments: folder for the numbers of steps, and whether the loaders have a `length`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from moextend_pl.training.termination import EqualSteps

BATCHES = (9, 6)


class Stream(IterableDataset):
    """As many samples as it is told, without a length."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(self.samples, 32))


class Model(BoringModel):
    def __init__(self, sized: bool) -> None:
        super().__init__()
        self.sized = sized

    def train_dataloader(self) -> Any:
        samples = BATCHES[self.global_rank]
        return DataLoader(torch.ones(samples, 32) if self.sized else Stream(samples))


def main(folder: Path, sized: bool) -> None:
    """Writes down how many steps each rank took in two epochs."""
    options = {"use_distributed_sampler": False, "limit_val_batches": 0, "enable_progress_bar": False, "logger": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=[EqualSteps()],
        enable_checkpointing=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(Model(sized))
    (folder / str(trainer.global_rank)).write_text(str(trainer.global_step))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "length")
