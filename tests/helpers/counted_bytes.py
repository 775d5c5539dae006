"""Counts the bytes that a rank receives from others in a training step, by what torch is asked to send."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def received(name: str, arguments: Any, rank: int, ranks: int) -> float:
    """Returns the bytes that a collective brings to a rank; sums go around in a ring."""
    if name == "c10d::allreduce_":
        return 2 * (1 - 1 / ranks) * sum(tensor.nbytes for tensor in arguments[0])
    if name == "c10d::_allgather_base_":
        return float(arguments[0].nbytes - arguments[1].nbytes)
    if name == "c10d::_reduce_scatter_base_":
        return (1 - 1 / ranks) * arguments[1].nbytes
    if name == "c10d::alltoall_base_":
        output: Tensor = arguments[0]
        row = output.element_size() * math.prod(output.shape[1:])
        sizes = arguments[3] or [len(output) // ranks] * ranks
        return float(row * sum(size for other, size in enumerate(sizes) if other != rank))
    return 0.0


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        size = received(name, args, dist.get_rank(), dist.get_world_size())
        if size:
            self.bytes[name] = self.bytes.get(name, 0.0) + size
        return func(*args, **(kwargs or {}))


class CountedBytes(Callback):
    """Writes `received_RANK.json` into the run directory: bytes of every step, and how many tokens it had."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.mode = _Count()
        self.tokens = batch["input_ids"].numel()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.steps.append({"tokens": self.tokens, "bytes": self.mode.bytes})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"received_{trainer.global_rank}.json"
        path.write_text(json.dumps(self.steps))
