"""What all ranks settle together before a model is built: which checkpoint they start from, and whether it fits."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from moextend_pl.contracts import UserError
from moextend_pl.runs.checkpoint import peek
from moextend_pl.training.stage import StageModule


class CommonStart(Callback):
    """Refuses a start that ranks do not agree on, or from a checkpoint that was made from something else.

    It stands behind the callbacks that declare plans, and before the networks are built.

    Args:
        checkpoint: The file that this rank starts from; None where it found none.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares.

        Raises:
            UserError: On all ranks, if there is a difference.
        """
        saved = peek(Path(self.checkpoint)) if self.checkpoint else {}
        if trainer.world_size > 1:
            _agree(f"the checkpoint of step {saved.get('global_step', '?')}" if self.checkpoint else "no checkpoint")
        if isinstance(pl_module, StageModule) and saved:
            pl_module.refuse_other_sources(saved, str(self.checkpoint))


def _agree(found: str) -> None:
    """Refuses ranks that found different things.

    Raises:
        UserError: If they did.
    """
    by_rank: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(by_rank, found)
    other = next((rank for rank, each in enumerate(by_rank) if each != by_rank[0]), None)
    if other is not None:
        raise UserError(
            f"Expected all ranks to start from one checkpoint, got {by_rank[0]} on rank 0 and {by_rank[other]} on rank "
            f"{other}. Put `trainer.default_root_dir` on a disk that all nodes share."
        )
