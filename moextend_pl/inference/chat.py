"""A conversation that goes on: every question is asked with all that was said and shown before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from moextend_pl.inference.asking import AskMixin
from moextend_pl.inference.pictures import open_picture
from moextend_pl.inference.sounds import open_sound
from moextend_pl.samples.messages import Picture, Question, Sound, ask


def next_question(
    said: Question | None, text: str, pictures: Sequence[Picture] = (), sounds: Sequence[Sound] = ()
) -> Question:
    """Returns a question with all that was said and shown before; its files are opened once, for all turns to come.

    Raises:
        UserError: If the question is empty or a picture or sound cannot be read.
    """
    shown, heard = [open_picture(picture) for picture in pictures], [open_sound(sound)[0] for sound in sounds]
    return ask(text, shown, said, heard)


def answered(question: Question, answer: str) -> Question:
    """Returns the conversation that a question and its answer make, for the next one to go on with."""
    return replace(question, turns=(*question.turns[:-1], replace(question.turns[-1], gpt=answer)))


class Chat:
    """A conversation with a model.

    Args:
        model: Who answers.
        task: Name of the task, where the model was extended for several.
        system: Instruction that stands before the first question.
        options: How answers are generated, see `GenerationSpec`.

    Raises:
        UserError: If an option cannot be used.

    Example:
        chat = Chat(moextend_pl.load("runs/quickstart/3_extend"))
        answer = "".join(chat.ask("what color is the shape?", ["shape.png"]))  # or piece by piece, as they come
    """

    def __init__(self, model: AskMixin, task: str = "", system: str = "", **options: Any) -> None:
        self.model, self.task, self.system = model, task, system
        self.spec = model.generation.with_options(options)
        self.said: Question | None = None

    def ask(self, text: str, pictures: Sequence[Picture] = (), sounds: Sequence[Sound] = ()) -> Iterator[str]:
        """Yields the answer piece by piece; it is part of the conversation when it was heard to its end.

        Args:
            text: The next question.
            pictures: Shown with it, before its words.
            sounds: Heard with it, before its words.

        Raises:
            UserError: As `AskMixin.generate`; the conversation stays as it was.
        """
        question = next_question(self.said, text, pictures, sounds)
        if self.said is None and self.system:
            question = replace(question, turns=(replace(question.turns[0], system=self.system),))
        heard = []
        if self.spec.beams > 1:
            heard += self.model.answers([question], self.task, self.spec)
            yield heard[0]
        else:
            for piece in self.model.stream(question, self.task, self.spec):
                heard.append(piece)
                yield piece
        self.said = answered(question, "".join(heard))

    def begin_anew(self) -> None:
        """Forgets what was said and shown."""
        self.said = None
