"""Control tokens that stand in data as text: they stay text, so that no question can pose as the end of an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from transformers import PreTrainedTokenizerBase

from moextend_pl.samples.turns import Turn, without_marks

PRIVATE_USE = 0xF0000
"""Characters from here on have no meaning of their own, see https://www.unicode.org/faq/private_use.html."""


def control_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns the texts that a tokenizer reads as control tokens, without the marks of images and sounds.

    A text of one character is left out: nothing could be told apart inside of it.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings = added | set(tokenizer.all_special_tokens)
    return tuple(sorted(text for text in strings if len(text) > 1 and without_marks(text) == text))


class Disguise:
    """Stand-ins for the control tokens that the texts of one conversation hold.

    A template renders the stand-ins as it renders any other character; `reveal` then says where in the rendered text
    the data's own control tokens are, as opposed to the template's.

    Args:
        turns: The conversation.
        controls: Texts that the tokenizer reads as control tokens.
    """

    def __init__(self, turns: tuple[Turn, ...], controls: tuple[str, ...]) -> None:
        self.turns = turns
        self._controls: dict[str, str] = {}
        words = "\n".join(text for turn in turns for text in (turn.system, turn.human, turn.gpt))
        held = [control for control in controls if control in words]
        if held:
            free = (chr(code) for code in count(PRIVATE_USE) if chr(code) not in words)
            stand_ins = {control: next(free) for control in held}
            self._controls = {stand_in: control for control, stand_in in stand_ins.items()}
            self.turns = tuple(self._disguised(turn, stand_ins) for turn in turns)

    def reveal(self, text: str) -> tuple[str, tuple[int, ...], Callable[[int], int]]:
        """Puts the control tokens back into a rendered text.

        Args:
            text: What the template made of `turns`.

        Returns:
            The text; the places behind the first character of each control token that is data, where it has to be
            broken to stay text; and a function from a place in the disguised text to the same place in this one.
        """
        hidden = (
            [place for place, character in enumerate(text) if character in self._controls] if self._controls else []
        )

        def moved(place: int) -> int:
            return place + sum(len(self._controls[text[at]]) - 1 for at in hidden if at < place)

        breaks = tuple(moved(place) + 1 for place in hidden)
        return "".join(self._controls.get(character, character) for character in text), breaks, moved

    @staticmethod
    def _disguised(turn: Turn, stand_ins: dict[str, str]) -> Turn:
        # The longest first: one control token may be the start of another.
        pattern = re.compile("|".join(map(re.escape, sorted(stand_ins, key=len, reverse=True))))
        system, human, gpt = (
            pattern.sub(lambda match: stand_ins[match.group()], text) for text in (turn.system, turn.human, turn.gpt)
        )
        return replace(turn, system=system, human=human, gpt=gpt)
