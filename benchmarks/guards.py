"""What do guard, watchdog and agreement cost, of a training step?

    python benchmarks/guards.py --rounds 30

The step is that of `step.py` (all layers extended, loss at labels only), on one process, and on two that share their
gradients (gloo). Without and with the three callbacks that every run of the command line has, in turns. Two medians
differ by more than the callbacks take, so that these are also timed by themselves, within the step: `share`.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import step
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from harness import DTYPES, Row, finish, interleaved, parse
from torch import Tensor

from moextend_pl.contracts import Batch
from moextend_pl.runs.interruptions import Notes
from moextend_pl.training.finite import NumbersGuard
from moextend_pl.training.termination import EndTogether, Watchdog

CASE = "all layers extended, projector learns, loss at labels only"


class Watched(step.Trained):
    """The model of a case with the callbacks of a run, called where Lightning calls them."""

    def __init__(self, case: step.Case, size: step.Size, dtype: torch.dtype, device: str, world_size: int) -> None:
        super().__init__(case, size, dtype, device)
        self.device = torch.device(device)
        self.callbacks = [NumbersGuard(), EndTogether(Notes()), Watchdog()]
        strategy = SimpleNamespace(launcher=None, reduce_boolean_decision=lambda told, **_: told)
        self.trainer: Any = SimpleNamespace(
            world_size=world_size, strategy=strategy, precision_plugin=None, callbacks=self.callbacks,
            global_step=0, max_steps=-1, should_stop=False, default_root_dir=tempfile.gettempdir(),
            global_rank=dist.get_rank() if world_size > 1 else 0,
        )  # fmt: skip
        self.seconds = 0.0
        self.call("on_train_start")

    def call(self, hook: str, *arguments: object) -> None:
        """Calls a hook of all callbacks, and counts its time."""
        begin = time.perf_counter()
        for callback in self.callbacks:
            getattr(callback, hook)(self.trainer, self, *arguments)
        self.seconds += time.perf_counter() - begin

    def bare(self, batch: Batch, features_IPC: Tensor) -> None:
        """Does one step, gradients shared."""
        self.loss(batch, features_IPC).backward()
        self._share()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def watched(self, batch: Batch, features_IPC: Tensor) -> None:
        """Does the same among the callbacks."""
        self.seconds = 0.0
        self.call("on_train_batch_start", batch, 0)
        loss = self.loss(batch, features_IPC)
        self.call("on_before_backward", loss)
        loss.backward()
        self._share()
        self.call("on_before_optimizer_step", self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainer.global_step += 1
        self.call("on_train_batch_end", None, batch, 0)

    def _share(self) -> None:
        if self.trainer.world_size > 1:
            gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
            dist.all_reduce(gradients)


def compare(size: step.Size, dtype: str, options: argparse.Namespace, world_size: int = 1) -> Row:
    """Times a step with and without the callbacks."""
    case = next(each for each in step.cases(size) if each.name == CASE)
    batch, features = step.make_batch(size, DTYPES[dtype], options.device)
    model = Watched(case, size, DTYPES[dtype], options.device, world_size)
    seconds: list[float] = []
    steps: dict[str, Callable[[], object]] = {
        "bare": lambda: model.bare(batch, features),
        "watched": lambda: (model.watched(batch, features), seconds.append(model.seconds)),
    }
    times = interleaved(steps, options)
    model.call("on_train_end")
    inside = statistics.median(seconds[1:]) * 1e3
    bare = times["bare"]["median_ms"]
    return {
        "processes": world_size, "dtype": dtype, "step ms": bare, "with callbacks ms": times["watched"]["median_ms"],
        "spread": times["bare"]["spread"], "callbacks ms": round(inside, 3), "share": f"{inside / bare:.2%}",
    }  # fmt: skip


def on_two(rank: int, port: int, size: step.Size, options: argparse.Namespace, rows: Any) -> None:
    """Does the same on one of two processes; the first one tells."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = [compare(size, dtype, options, world_size=2) for dtype in options.dtype]
    dist.destroy_process_group()
    if rank == 0:
        rows.put(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table and returns the exit code."""
    question = __doc__.splitlines()[0]
    options = parse(question, argv)
    size = (
        step.Size(layers=2, width=32, inner=32, vocabulary=64, batch=2, sequence=32) if options.quick else step.Size()
    )
    rows = [compare(size, dtype, options) for dtype in options.dtype]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = processes.get_context("spawn").SimpleQueue()
    processes.spawn(on_two, (port, size, options, told), nprocs=2)
    return finish(question, {f"one step of {size}": [*rows, *told.get()]}, options)


if __name__ == "__main__":
    sys.exit(main())
