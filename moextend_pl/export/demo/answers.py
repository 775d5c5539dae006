"""One answer and what stands beside it: which experts it took, and what the base alone says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moextend_pl.contracts import Batch, UserError
from moextend_pl.evaluation.retention import keeps_base
from moextend_pl.export.demo.expert_map import ExpertMap, base_experts, expert_map
from moextend_pl.inference import decoding
from moextend_pl.inference.chat import answered, next_question
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.inference.streaming import stream
from moextend_pl.models.moextend import MoExtend
from moextend_pl.samples.host_facts import is_image
from moextend_pl.samples.messages import Picture, Question
from moextend_pl.samples.turns import IMAGE_MARK


@dataclass(frozen=True)
class Told:
    """How far an answer has come; what is not known yet is None.

    Attributes:
        answer: As much of it as there is.
        said: The conversation with the whole answer in it, for the next question to go on with.
        chosen: Which experts it took.
        base: What the base says with the same pictures, seen by the run's own tower and projector, and no new expert
            within reach; stays None where the model has none, or its base learned.
        blind: What the base says to the words alone; stays None there too, and where no picture was shown.
    """

    answer: str
    said: Question | None = None
    chosen: ExpertMap | None = None
    base: str | None = None
    blind: str | None = None


def without_pictures(question: Question) -> Question:
    """Returns the words of a conversation alone."""
    turns = [replace(turn, human=turn.human.replace(f"{IMAGE_MARK}\n", "")) for turn in question.turns]
    return Question(tuple(turns))


@torch.no_grad()
def base_answer(model: MoExtend, batch: Batch, spec: GenerationSpec) -> str:
    """Returns what the base answers: its own weights and experts, bit for bit, whatever the plans of the model say.

    Args:
        model: Extended or not.
        batch: One prompt; its pictures are features of the model's tower and projector, which the base never had.
        spec: How the answer is generated.
    """
    language = model.language
    with language.turn:
        language.close_reach()
        language.sight.open(batch, language.image_token_id)  # layers that look belong to the projector
        try:
            (answer,) = decoding.answers(language.model, language.tokenizer, batch, model.embed, spec)
        finally:
            language.sight.close()
    return answer


class Demonstration:
    """Answers one question at a time, whoever asks; conversations belong to those who ask.

    Args:
        model: Who answers.
        task: Name of the task, where the model was extended for several.
        options: How answers are generated, see `GenerationSpec`; from all tokens of the pictures.

    Raises:
        UserError: If an option cannot be used.
    """

    def __init__(self, model: MoExtend, task: str = "", **options: Any) -> None:
        self.model, self.task = model, task
        self.spec = model.generation.with_options({"beams": 1, **options})
        if self.spec.reduce is not None:
            raise UserError(
                f"Expected no `reduce` beside a map of experts, which counts all tokens, got {self.spec.reduce!r}. "
                "Remove it."
            )
        self.old = base_experts(model.language.model)
        self.keeps_base = keeps_base(model)

    def ask(self, said: Question | None, text: str, pictures: Sequence[Picture] = ()) -> Iterator[Told]:
        """Yields an answer as it comes, then the experts that it took, then the base's answers.

        Args:
            said: The conversation so far, None at its beginning.
            text: The next question.
            pictures: Shown with it.

        Raises:
            UserError: As `AskMixin.generate`.
        """
        question = next_question(said, text, pictures)
        batch = self.model.prompt(question, self.task)
        found: list[ExpertMap] = []
        told = Told("")
        for piece in stream(lambda tell: found.append(self._answer(batch, tell))):
            told = replace(told, answer=told.answer + piece)
            yield told
        told = replace(told, said=answered(question, told.answer), chosen=found[0])
        yield told
        if not self.model.plans or not self.keeps_base:
            return
        told = replace(told, base=base_answer(self.model, batch, self.spec))
        yield told
        if question.pictures:
            words = self.model.prompt(without_pictures(question), self.task)
            yield replace(told, blind=base_answer(self.model, words, self.spec))

    def _answer(self, batch: Batch, tell: Callable[[str], None]) -> ExpertMap:
        language = self.model.language
        # The lock is taken and given back in the thread that generates: who goes away cannot keep it.
        with language.turn, language.watch.recording() as records:
            self.model.answer(batch, self.spec, tell)
        return expert_map(records, is_image(batch, language.image_token_id)[0], self.old)
