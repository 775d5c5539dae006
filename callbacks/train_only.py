"""Declares what learns in a run, and shows it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from moextend_pl.contracts import TrainPlan
from moextend_pl.training.stage import StageModule

log = logging.getLogger(__name__)


def bytes_by_type(parameters: Iterable[Tensor]) -> dict[str, int]:
    """Returns the bytes of all parameters by their type, the largest sum first.

    Args:
        parameters: Of a model; 4-bit weights are bytes (`uint8`) with scales in `float32`.
    """
    sizes: Counter[str] = Counter()
    for parameter in parameters:
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() * parameter.element_size()
    return dict(sizes.most_common())


def parts_table(parts: dict[str, list[nn.Parameter]]) -> str:
    """Lists the parts of a model with their parameters, bytes, types, and whether they learn.

    Args:
        parts: Parameters by part.

    Returns:
        A table of one line a part, one for the total and one with the bytes of each type. A byte of 4-bit weights
        counts as two parameters; their scales count too.
    """
    rows = [("part", "parameters", "MB", "type", "")]
    for name, parameters in [*parts.items(), ("total", [p for group in parts.values() for p in group])]:
        if not parameters:
            continue
        count = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parameters)
        size = sum(p.numel() * p.element_size() for p in parameters) / 1e6
        types = ",".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        state = f"{learning:,} learn" if name == "total" else "learns" if learning else "frozen"
        rows.append((name, f"{count:,}", f"{size:,.2f}", types, state))
    table = [f"  {a:<13}{b:>14}{c:>11}  {d:<13} {e}" for a, b, c, d, e in rows]
    sizes = bytes_by_type(p for group in parts.values() for p in group)
    by_type = ", ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in sizes.items())
    return "\n".join([*table, f"  by type: {by_type}"])


class TrainOnly(Callback):
    """Lets the named parts learn and freezes all others; prints the table of both once.

    The plan is declared in `setup` and applied by the module when it builds its networks, before
    the optimizer exists.

    Args:
        parts: Names out of the module's `parts()`, for example `[projector, new_experts, new_routers]`.

    Example:
        callbacks:
          - class_path: callbacks.TrainOnly
            init_args: {parts: [projector]}
    """

    def __init__(self, parts: list[str]) -> None:
        self.plan = TrainPlan(parts=tuple(parts))

    def setup(self, trainer: Trainer, pl_module: StageModule, stage: str) -> None:
        """Declares the plan."""
        pl_module.train_plan = self.plan

    def on_fit_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Shows what is frozen and what learns."""
        if trainer.is_global_zero:
            log.info("parameters:\n%s", parts_table(pl_module.parts()))
