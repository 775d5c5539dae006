"""Which ranks a SIGTERM ends, and what stays as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moextend_pl.training.termination import EndTogether

STARTS = ("train", "validation", "test", "predict")


@pytest.fixture(autouse=True)
def earlier() -> Iterator[Any]:
    """Ignores SIGTERM for the time of a test, so that a missing handler does not end the tests."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)


def trainer(world_size: int, others_told: bool = False) -> Any:
    def reduce(decision: bool, all: bool) -> bool:
        assert not all
        return decision or others_told

    return SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(reduce_boolean_decision=reduce))


@pytest.mark.parametrize("loop", STARTS)
def test_a_rank_that_is_told_ends_at_its_next_batch(loop: str) -> None:
    together, two = EndTogether(), trainer(2)
    getattr(together, f"on_{loop}_start")(two, None)
    getattr(together, f"on_{loop}_batch_start")(two, None, None, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        getattr(together, f"on_{loop}_batch_start")(two, None, None, 1)


@pytest.mark.parametrize("loop", STARTS)
def test_a_rank_ends_when_another_one_was_told(loop: str) -> None:
    with pytest.raises(SIGTERMException):
        getattr(EndTogether(), f"on_{loop}_batch_start")(trainer(2, others_told=True), None, None, 0)


def test_a_run_of_one_process_keeps_the_handler_it_has(earlier: Any) -> None:
    together, one = EndTogether(), trainer(1, others_told=True)
    together.on_train_start(one, None)
    assert signal.getsignal(signal.SIGTERM) == earlier
    together.on_train_batch_start(one, None, None, 0)
