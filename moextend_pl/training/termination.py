"""All ranks end after equal steps: told to end, with a checkpoint; and where one of them has no further batch."""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from moextend_pl.contracts import UserError, run_directory
from moextend_pl.runs.checkpoint import CHECKPOINT_FOLDER, PENDING_CHECKPOINT, take_place
from moextend_pl.runs.interruptions import EXIT_TOLD, Heartbeat, Heartbeats, Notes, Told

log = logging.getLogger(__name__)
SHOWN_KEYS = 8
OTHERS_SAY = 2.0  # seconds in which ranks that stand still with this one say where


class NoHandlers(_SignalConnector):
    """Leaves signals to `Notes`.

    Lightning's handler of SIGTERM talks to the other ranks inside of the handler, where they stand at another place: a
    run of which one rank is told hangs. It cannot be switched off.
    """

    def register_signal_handlers(self) -> None:
        """Registers none."""
        self.received_sigterm = False


class EndTogether(Callback):
    """Ends all ranks once any of them was told to, with a checkpoint of the step that all of them have taken.

    Ranks tell each other with the verdict that `NumbersGuard` exchanges in each step; where there is none, at the end
    of each step. Told in a validation, a run saves what it was before it, and validates again when it goes on. The
    last step is not saved: what the stage writes comes next.

    Args:
        notes: What this process was told.
    """

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.agreed = False
        self.carried = False
        self._step = 0
        self._saved = False
        self._loops: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends a run that was told while it started, before anything is built."""
        trainer._signal_connector = NoHandlers(trainer)
        self.notes.release()  # the other processes are there
        self.notes.at_once = trainer.world_size == 1
        if trainer.local_rank > 0 and isinstance(_environment(trainer), LightningEnvironment):
            self.notes.launcher = os.getppid()
        self._end_if_told(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a run that was told before its first step; from here on there is something to save."""
        self.notes.at_once = False
        self._step, self._saved, self.agreed = trainer.global_step, False, False
        self._end_if_told(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves after a step, if a rank was told."""
        if trainer.global_step == self._step or trainer.global_step == trainer.max_steps:
            return
        self._step = trainer.global_step
        if trainer.world_size == 1 or not self.carried:
            self.agreed = self._is_told(trainer)
        if self.agreed:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run when the metrics of the step that was saved are written."""
        if self._saved:
            self._end(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ends the run if a rank was told; within a training, with what it was before the validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            self._end_if_told(trainer)
            return
        if batch_idx == dataloader_idx == 0:
            self._loops = _before_validation(trainer)
        if trainer.global_step != trainer.max_steps and (self._saved or self._is_told(trainer)):
            self._save(trainer)
            self._end(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run if a rank was told."""
        self._end_if_told(trainer)

    on_predict_batch_start = on_test_batch_start  # type: ignore[assignment]  # Lightning calls its hooks by place

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets a run that ends in a validation begin with that validation."""
        if self._saved and trainer.validating:
            checkpoint["loops"]["fit_loop"] = self._loops

    def _is_told(self, trainer: Trainer) -> bool:
        told = bool(self.notes.told)
        return told if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(told, all=False)

    def _end_if_told(self, trainer: Trainer) -> None:
        if self._is_told(trainer):
            raise Told

    def _save(self, trainer: Trainer) -> None:
        self._saved = True
        trainer.save_checkpoint(run_directory(trainer) / CHECKPOINT_FOLDER / PENDING_CHECKPOINT)

    def _end(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            take_place(run_directory(trainer) / CHECKPOINT_FOLDER / PENDING_CHECKPOINT)
        trainer.strategy.barrier()  # what started the ranks may kill the others when one has ended
        raise Told


def _before_validation(trainer: Trainer) -> dict[str, Any]:
    """Returns the state of the loops at the first batch of a validation, as Lightning knows one that was broken off."""
    state: dict[str, Any] = copy.deepcopy(trainer.fit_loop.state_dict())
    progress = state["epoch_loop.val_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["started"] = counts["ready"]
    return state


class EqualSteps(Callback):
    """Ends an epoch on all ranks when one of them has no further batch; the others would wait for it for ever.

    Lengths are compared once. Loaders without a length are asked at each batch, but for those that say `endless`.
    """

    def __init__(self) -> None:
        self._asks = False
        self._batches: float = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the lengths."""
        if trainer.world_size == 1:
            return
        lengths: list[float] = [0.0] * trainer.world_size
        dist.all_gather_object(lengths, float(trainer.num_training_batches))
        least = min(lengths)
        if max(lengths) != least:
            log.warning("the loaders of the ranks hold %s batches; each takes %d of them", lengths, least)
            trainer.fit_loop.max_batches = int(least)
        self._batches = trainer.num_training_batches
        self._asks = math.isinf(least) and not getattr(trainer.train_dataloader, "endless", False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expects the next epoch to be whole again."""
        if self._asks:
            trainer.fit_loop.max_batches = self._batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Makes a batch the last one of all ranks if it is that of one."""
        if self._asks:
            last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            if trainer.strategy.reduce_boolean_decision(last, all=False):
                trainer.fit_loop.max_batches = batch_idx + 1


class Watchdog(Callback):
    """Ends a run that stands still, on all ranks, and says where it stood; every start of the command line has one.

    A rank that waits for another one that hangs stands still as well, so that each tells where it is in a file of the
    run directory now and then: the one that fires names those that say nothing, or else have come less far. What its
    data, a batch and a checkpoint need is counted each by itself. Name it under `trainer.callbacks` to set its time.

    Args:
        timeout: Seconds without a new batch, after which the process ends with exit code 75: a job is queued again.

    Raises:
        UserError: If that is no number above 0.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        if timeout <= 0:
            raise UserError(f"Expected `timeout` of Watchdog above 0 seconds, got {timeout}.")
        self.timeout, self._tells_every = timeout, min(30.0, timeout / 8)
        self._moved = time.monotonic()
        self._at, self._keys, self._over = Heartbeat(), "", threading.Event()
        self._last = False
        self._kill: Callable[[], object] = lambda: None
        self._beats: Heartbeats | None = None
        self._teller: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to watch."""
        self._kill = partial(_kill_others, trainer, os.getppid())
        self._over.clear()
        self._note(trainer, "waited for its first batch")
        threading.Thread(target=self._watch, args=(trainer.global_rank,), daemon=True, name="watchdog").start()
        if trainer.world_size > 1:  # a thread of its own: on a file system that hangs, nothing is told for ever
            self._beats = Heartbeats(run_directory(trainer), trainer.global_rank, trainer.world_size)
            self._teller = threading.Thread(target=self._tell, args=(self._beats,), daemon=True, name="heartbeat")
            self._teller.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes that a batch has come."""
        keys = batch.get("keys", ()) if isinstance(batch, Mapping) else ()
        self._keys = ", ".join([*keys[:SHOWN_KEYS], *(["..."] if len(keys) > SHOWN_KEYS else [])])
        self._note(trainer, "was in")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Notes that a batch is done; what is measured and written after the last one may take its time."""
        self._note(trainer, "waited for the next batch after")
        self._last = 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Notes that a batch of a validation has come, which is watched after the last step too."""
        self._note(trainer, "was in a validation after")
        self._last = False

    on_validation_batch_end = on_validation_batch_start  # type: ignore[assignment]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that a validation is over."""
        self.on_train_batch_end(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes that a checkpoint is written."""
        self._note(trainer, "wrote a checkpoint of")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the watch: results may take their time."""
        self._over.set()
        if self._teller is not None:
            self._teller.join(OTHERS_SAY)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the watch of a run that failed: the process, a notebook's perhaps, may go on."""
        self.on_train_end(trainer, pl_module)

    def _note(self, trainer: Trainer, doing: str) -> None:
        step = trainer.global_step
        notes = self._at.notes + 1 if self._at.step == step else 0
        self._at = Heartbeat(step, notes, f"{doing} step {step}")
        self._moved = time.monotonic()

    def _tell(self, beats: Heartbeats) -> None:
        beats.tell(self._at)
        while not self._over.wait(self._tells_every):
            beats.tell(self._at)
        beats.end()

    def _watch(self, rank: int) -> None:
        while not self._over.wait(min(1.0, self.timeout / 4)):
            if not self._last and time.monotonic() - self._moved > self.timeout:
                at = self._at
                others = self._beats.suspects(at, 1.5 * self._tells_every) if self._beats else ""
                if self._at is not at or self._over.is_set():
                    continue  # it has gone on meanwhile, or come to its end
                log.error(
                    "rank %d stands still: for %.0f s it %s; its last samples: %s. %sThe run ends; the same command "
                    "continues from its last checkpoint",
                    *(rank, self.timeout, at.place, self._keys or "(none)", others),
                )
                self._kill()
                os._exit(EXIT_TOLD)


def _kill_others(trainer: Trainer, parent: int) -> None:
    """Kills the processes that Lightning started beside this one: they may be stopped and hear nothing else."""
    launcher = trainer.strategy.launcher
    if not isinstance(_environment(trainer), LightningEnvironment):
        return  # a scheduler ends the rest of the job
    if trainer.local_rank > 0:
        time.sleep(2 * OTHERS_SAY)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
    elif isinstance(launcher, _SubprocessScriptLauncher):
        time.sleep(OTHERS_SAY)
        launcher.kill(signal.SIGKILL)


def _environment(trainer: Trainer) -> object:
    return getattr(trainer.strategy, "cluster_environment", None)
