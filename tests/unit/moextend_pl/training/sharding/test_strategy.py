"""Processes of a node make their models one after another, and a mistake of one ends none of the others' turns."""

from __future__ import annotations

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.training.sharding.strategy import ShardedStrategy


class Second(ShardedStrategy):
    """The second of three processes on its node."""

    num_processes, local_rank = 3, 1  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.others_fail = False

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision or self.others_fail

    def barrier(self, name: str | None = None) -> None:
        self.events.append("all meet")


def test_model_is_made_between_those_of_the_neighbours() -> None:
    strategy = Second()
    strategy.in_turn(lambda: strategy.events.append("made"))
    assert strategy.events == ["all meet", "made", "all meet", "all meet"]


def test_models_that_need_no_room_are_made_at_once() -> None:
    strategy = Second()
    strategy.in_turn(lambda: strategy.events.append("made"), at_once=True)
    assert strategy.events == ["made", "all meet"]


def test_mistake_is_told_when_all_had_their_turn() -> None:
    strategy = Second()

    def fail() -> None:
        raise UserError("no such folder.")

    with pytest.raises(UserError, match="no such folder"):
        strategy.in_turn(fail)
    assert strategy.events == ["all meet"] * 3


def test_mistake_of_another_process_ends_this_one_too() -> None:
    strategy = Second()
    strategy.others_fail = True
    with pytest.raises(UserError, match="Another process could not make its model"):
        strategy.in_turn(lambda: None)
