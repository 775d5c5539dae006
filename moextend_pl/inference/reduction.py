"""How many picture tokens a question is answered from: AIM's published schedule by name, or others by numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moextend_pl.contracts import UserError

ROUNDS = 2
"""Of merging; a quarter of the tokens is left."""


@dataclass(frozen=True)
class Reduction:
    """What is merged before the language model and dropped inside of it.

    Attributes:
        rounds: Of merging; each about halves the tokens of a picture.
        drops: Whether layers drop tokens.
        span: l1 and l2: after layer l1 the first tokens are dropped, after the layer before l2 none is left; None for
            the published ones, at half of the layers and two sevenths later (14 and 22 of 28).
    """

    rounds: int = 0
    drops: bool = False
    span: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str | None) -> Reduction:
        """Reads `aim`, `aim:L1,L2`, `aim:L1,L2,ROUNDS`, `aim_merge` or `aim_merge:ROUNDS`; None reduces nothing.

        Raises:
            UserError: If the text is none of these.
        """
        if text is None:
            return cls()
        match = re.fullmatch(r"aim_merge(?::([1-9]))?|(aim)(?::(\d+),(\d+)(?:,(\d))?)?", text)
        if match is None:
            raise UserError(
                "Expected `reduce` to be aim, aim:L1,L2 or aim:L1,L2,ROUNDS (picture tokens are dropped between the "
                f"layers L1 and L2), or aim_merge or aim_merge:ROUNDS (they are merged only), got {text!r}."
            )
        merged, drops, first, last, rounds = match.groups()
        span = None if first is None else (int(first), int(last))
        return cls(int(merged or rounds or ROUNDS), drops is not None, span)

    def layers(self, count: int) -> tuple[int, int]:
        """Returns l1 and l2 of a model.

        Args:
            count: Number of its layers.
        """
        return self.span or (count // 2, count // 2 + max(2 * count // 7, 1))


def check_none_dropped(reduction: Reduction, looks: bool) -> None:
    """Refuses to drop tokens of a model that looks at pictures: none of theirs stands among the words.

    Args:
        reduction: What is asked for.
        looks: Whether the model looks at pictures.

    Raises:
        UserError: If it does, and tokens are to be dropped.
    """
    if reduction.drops and looks:
        raise UserError(
            "Expected `reduce` as aim_merge or aim_merge:ROUNDS for a model with `projector.cross_attention`, whose "
            "words have no picture tokens between them that could be dropped, got aim."
        )


def check_asked_only(reduce: str | None) -> None:
    """Refuses a reduction as an option of a stage, whose data stands with all tokens of its pictures.

    Args:
        reduce: `language.generation.reduce` of the stage.

    Raises:
        UserError: If there is one.
    """
    if reduce is not None:
        raise UserError(
            f"Expected no `language.generation.reduce` in a stage, got {reduce!r}: samples stand with all tokens of "
            "their pictures. Remove it, and ask with `generate --reduce`, `chat --reduce` or `evaluate --reduce`."
        )
