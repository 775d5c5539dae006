"""Makes the numbers of chosen steps none, as a damaged sample or a learning rate out of bounds does."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

EMBEDDING = "language.model.model.embed_tokens"


class Poison(Callback):
    """Multiplies in chosen steps what a module returns by NaN, or the gradient of a parameter by infinity.

    Args:
        steps: Numbers of the steps, from 0.
        place: Name of the module, or of the parameter.
        gradient: Whether it is a parameter.
        ranks: Where this happens.
        first_only: Whether only the first batch of a step is hit.
    """

    def __init__(
        self,
        steps: list[int],
        place: str = EMBEDDING,
        gradient: bool = False,
        ranks: list[int] | None = None,
        first_only: bool = False,
    ) -> None:
        self.steps, self.place, self.gradient, self.ranks, self.first_only = steps, place, gradient, ranks, first_only
        self.handle: RemovableHandle | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        here = self.ranks is None or trainer.global_rank in self.ranks
        if not here or trainer.global_step not in self.steps:
            return
        if self.first_only and batch_idx % trainer.accumulate_grad_batches:
            return
        if self.gradient:
            parameter = pl_module.get_parameter(self.place)
            self.handle = parameter.register_hook(lambda gradient: gradient * math.inf)
        else:
            module = pl_module.get_submodule(self.place)
            self.handle = module.register_forward_hook(lambda _module, _inputs, output: output * math.nan)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
