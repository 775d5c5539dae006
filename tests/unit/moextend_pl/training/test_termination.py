"""Which ranks a signal ends, where, and what is saved."""

from __future__ import annotations

import csv
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_world import TinyWorld, make_plan
from lightning.pytorch import Callback, Trainer

from callbacks.checkpoints import StageCheckpoint
from callbacks.outputs import StageReceipt
from callbacks.train_only import TrainOnly
from moextend_pl.contracts import UserError
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.interruptions import EXIT_TOLD, Heartbeat, Notes, Told, listening
from moextend_pl.runs.metrics_log import RunLogger
from moextend_pl.training.termination import EndTogether, EqualSteps, Watchdog

NEW = ["projector", "new_experts", "new_routers", "calibration"]


@pytest.fixture
def notes() -> Iterator[Notes]:
    with listening() as notes:
        yield notes


def trainer(world_size: int, others_told: bool = False, fn: str = "fit") -> Any:
    def reduce(decision: bool, all: bool) -> bool:
        assert not all
        return decision or others_told

    strategy = SimpleNamespace(reduce_boolean_decision=reduce)
    return SimpleNamespace(
        world_size=world_size, strategy=strategy, state=SimpleNamespace(fn=fn), global_step=0, sanity_checking=False
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_while_others_listen_and_heard_as_before_afterwards(number: int) -> None:
    earlier = signal.getsignal(number)
    with listening() as notes:
        assert not notes.told
        os.kill(os.getpid(), number)
        assert notes.told == signal.Signals(number).name
        notes.at_once = True
        with pytest.raises(Told) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == EXIT_TOLD == 75
    assert signal.getsignal(number) == earlier


@pytest.mark.parametrize("loop", ["validation", "test", "predict"])
@pytest.mark.parametrize("others", [False, True], ids=["told itself", "another rank told"])
def test_a_rank_ends_at_the_batch_at_which_all_know(notes: Notes, loop: str, others: bool) -> None:
    start = getattr(EndTogether(notes), f"on_{loop}_batch_start")
    start(trainer(2, fn="test"), None, None, 0)
    if not others:
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Told):
        start(trainer(2, others_told=others, fn="test"), None, None, 1)


class Tell(Callback):
    """Sends this process a signal in the middle of a step, or in a validation."""

    def __init__(self, step: int, *, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        if self.step < 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if not self.validating and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.validating and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


Fit = Callable[..., MoExtend]


@pytest.fixture
def fit(tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path) -> Fit:
    def run(folder: str, *more: Callback, steps: int = 6) -> MoExtend:
        run, model = tmp_path / folder, tiny_world.unbuilt()
        model.extension_plan = make_plan()
        last = run / "checkpoints" / "last.ckpt"
        trainer = make_trainer(
            *[TrainOnly(NEW), StageCheckpoint(100), StageReceipt([]), *more],
            steps=steps,
            enable_checkpointing=True,
            default_root_dir=run,
            logger=RunLogger(str(run)),
            log_every_n_steps=1,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            limit_val_batches=3,
            accumulate_grad_batches=2,
        )
        data = tiny_world.datamodule("mixed", val=tiny_world.data("vqa", "test"))
        trainer.fit(model, data, ckpt_path=last if last.exists() else None, weights_only=True)
        return model

    return run


def rows(run: Path, column: str) -> dict[str, str]:
    with (run / "metrics.csv").open() as file:
        found = [(row["step"], row[column]) for row in csv.DictReader(file) if row.get(column)]
    assert len(dict(found)) == len(found), "a step was taken, or validated, twice"
    return dict(found)


@pytest.mark.parametrize(
    ("tell", "saved"),
    [
        pytest.param(Tell(0), 1, id="in its first step", marks=pytest.mark.slow),
        pytest.param(Tell(2), 3, id="in a step"),
        pytest.param(Tell(3), 4, id="before a validation", marks=pytest.mark.slow),
        pytest.param(Tell(2, validating=True), 2, id="in a validation"),
        pytest.param(Tell(4, validating=True), 4, id="in a later validation", marks=pytest.mark.slow),
    ],
)
def test_rows_9_and_11_told_to_end_a_run_saves_the_step_it_is_in_once_and_goes_on_as_if_nothing_had_happened(
    fit: Fit, tmp_path: Path, notes: Notes, tell: Tell, saved: int
) -> None:
    whole = fit("whole")
    with pytest.raises(Told):
        fit("cut", EndTogether(notes), tell)
    files = list((tmp_path / "cut" / "checkpoints").iterdir())
    assert [path.name for path in files] == ["last.ckpt"]
    assert torch.load(files[0], weights_only=True)["global_step"] == saved
    resumed = fit("cut", EndTogether(Notes()))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for column in ("train/loss", "val/loss"):
        assert rows(tmp_path / "cut", column) == rows(tmp_path / "whole", column)
    assert len(rows(tmp_path / "cut", "val/loss")) == 3


def test_told_before_its_first_step_a_run_ends_without_a_checkpoint(fit: Fit, tmp_path: Path, notes: Notes) -> None:
    with pytest.raises(Told):
        fit("cut", Tell(-1), EndTogether(notes))
    assert not list((tmp_path / "cut").rglob("*.ckpt"))


def test_told_in_its_last_step_a_run_writes_its_results(fit: Fit, tmp_path: Path, notes: Notes) -> None:
    fit("run", EndTogether(notes), Tell(5))
    assert (tmp_path / "run" / "stage.json").exists()


def test_lightning_puts_no_handler_in_the_place_of_ours(fit: Fit, notes: Notes) -> None:
    class Looks(Callback):
        def on_train_start(self, *_: Any) -> None:
            assert signal.getsignal(signal.SIGTERM) == notes.note

    fit("run", EndTogether(notes), Looks(), steps=1)
    assert signal.getsignal(signal.SIGTERM) == notes.note


def ranks(length: float, others: list[bool]) -> Any:
    """A trainer of two ranks, whose other one is at its last batch as told."""
    loop = SimpleNamespace(
        max_batches=length,
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=False)),
    )
    reduce = SimpleNamespace(reduce_boolean_decision=lambda own, all: own or others.pop(0))
    return SimpleNamespace(
        world_size=2, num_training_batches=length, fit_loop=loop, strategy=reduce, train_dataloader=[]
    )


def lengths_are(monkeypatch: pytest.MonkeyPatch, *lengths: float) -> None:
    def gather(found: list[float], _own: float) -> None:
        found[:] = lengths

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)


def test_row_20_ranks_take_as_many_batches_as_the_shortest_loader_has(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths_are(monkeypatch, 7, 5)
    two, equal = ranks(7, []), EqualSteps()
    equal.on_train_start(two, None)
    equal.on_train_batch_end(two, None, None, None, 0)
    assert two.fit_loop.max_batches == 5


def test_row_20_a_loader_without_a_length_ends_where_the_first_of_them_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths_are(monkeypatch, float("inf"), float("inf"))
    two, equal = ranks(float("inf"), [False, False, True, True]), EqualSteps()
    equal.on_train_start(two, None)
    for epoch in (3, 1):
        equal.on_train_epoch_start(two, None)
        assert two.fit_loop.max_batches == float("inf")
        for batch in range(epoch):
            equal.on_train_batch_end(two, None, None, None, batch)
        assert two.fit_loop.max_batches == epoch


def test_an_endless_loader_is_not_asked(monkeypatch: pytest.MonkeyPatch, tiny_world: TinyWorld) -> None:
    lengths_are(monkeypatch, float("inf"), float("inf"))
    two, equal = ranks(float("inf"), []), EqualSteps()
    data = tiny_world.datamodule("mixed", spec=tiny_world.unbuilt().sample_spec())
    data.setup("fit")
    two.train_dataloader = data.train_dataloader()
    equal.on_train_start(two, None)
    equal.on_train_batch_end(two, None, None, None, 0)
    assert two.fit_loop.max_batches == float("inf")
    assert not data.val_dataloader().endless


class Exited(BaseException):
    """Stands for the end of the process."""


class Stands(Callback):
    """Stands still in a step, as one that waits for another rank."""

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            time.sleep(6)


@pytest.mark.slow
def test_row_14_a_run_that_stands_still_ends_and_says_where(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), dog._over.set()))
    dog = Watchdog(4)
    with caplog.at_level("ERROR", logger="moextend_pl"):
        fit("run", Stands(), dog)
    assert codes == [EXIT_TOLD]
    assert re.search(r"rank 0 stands still: for 4 s it was in step 3; its last samples: \w\d+", caplog.text)


class Fails(Callback):
    """Stands for a run that ends with a mistake."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise UserError("a mistake")


def test_a_run_that_failed_is_watched_no_longer(fit: Fit) -> None:
    dog = Watchdog(60)
    with pytest.raises(UserError, match="a mistake"):
        fit("run", Fails(), dog)
    assert dog._over.is_set()


def test_a_run_that_moves_is_left_alone_and_watched_no_longer_than_it_lasts(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []  # a mistake in a thread would fail no test
    monkeypatch.setattr(os, "_exit", codes.append)
    fit("run", Watchdog(5), steps=2)
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(3)
            assert not thread.is_alive()
    assert codes == []
    with pytest.raises(UserError, match="`timeout` of Watchdog above 0 seconds, got 0"):
        Watchdog(0)


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "comes to its end"])
def test_a_run_is_not_ended_that_moves_while_others_are_asked(monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    dog, asked = Watchdog(0.05), []

    def suspects(*_: Any) -> str:
        asked.append(1)
        if goes_on and len(asked) == 1:
            dog._at = Heartbeat(1)
        else:
            dog._over.set()
        return ""

    dog._beats = SimpleNamespace(suspects=suspects)
    dog._watch(0)
    assert len(asked) == 1 + goes_on
    assert codes == []


@pytest.mark.parametrize(("step", "ends"), [(1, True), (2, False)], ids=["in the middle", "after the last step"])
def test_what_is_measured_and_written_after_the_last_step_may_take_its_time(
    monkeypatch: pytest.MonkeyPatch, step: int, ends: bool
) -> None:
    codes: list[int] = []
    dog, ended = Watchdog(0.2), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), dog._over.set(), ended.set()))
    at: Any = SimpleNamespace(
        global_step=step, max_steps=2, should_stop=False, global_rank=0, world_size=1,
        strategy=SimpleNamespace(launcher=None),
    )  # fmt: skip
    dog.on_train_start(at, None)
    dog.on_train_batch_end(at)
    assert ended.wait(1.5) == ends
    if not ends:  # a validation after the last step is watched, and only it
        dog.on_validation_batch_start(at)
        assert ended.wait(1.5)
        dog.on_validation_end(at, None)
        assert dog._last
    dog._over.set()
    assert codes == [EXIT_TOLD]
