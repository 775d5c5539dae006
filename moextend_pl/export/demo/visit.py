"""What a visitor asks, turn by turn: uploads are read, answers come, mistakes are told and change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.export.demo.answers import Demonstration
from moextend_pl.export.demo.conversation_html import ShownTurn, thumbnail
from moextend_pl.samples.messages import Question
from moextend_pl.samples.pixels import decode_image


@dataclass(frozen=True)
class Visit:
    """What one visitor has said and seen.

    Attributes:
        said: For the model.
        turns: For the page.
    """

    said: Question | None = None
    turns: tuple[ShownTurn, ...] = ()

    @property
    def settled(self) -> tuple[ShownTurn, ...]:
        """The turns without one whose answer was stopped, which is no part of what was said."""
        return tuple(turn for turn in self.turns if turn.problem or turn.told.said)


def next_turn(demonstration: Demonstration, visit: Visit, asked: Mapping[str, Any]) -> Iterator[Visit]:
    """Yields a visit as its next answer comes.

    Args:
        demonstration: Who answers.
        visit: So far.
        asked: `text`, and `files`, paths of pictures that were uploaded.

    Yields:
        The visit with one more turn; a mistake stands in it as that turn's problem, and what was said stays.
    """
    turns, text = visit.settled, str(asked.get("text") or "")
    turn = ShownTurn(text, has_new=bool(demonstration.model.plans), keeps_base=demonstration.keeps_base)
    try:
        pictures = [decode_image(Path(path).read_bytes(), Path(path).name) for path in asked.get("files") or ()]
        turn = replace(turn, pictures=tuple(map(thumbnail, pictures)))
        for told in demonstration.ask(visit.said, text, pictures):
            turn = replace(turn, told=told)
            yield Visit(told.said or visit.said, (*turns, turn))
    except UserError as error:
        yield Visit(visit.said, (*turns, replace(turn, problem=str(error))))
