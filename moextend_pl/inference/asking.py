"""What a model that sees and speaks is asked with: `generate`, for one question or many, whole or as a stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moextend_pl.contracts import Batch, ExtensionPlan, SampleSpec, UserError
from moextend_pl.inference.decoding import check_context
from moextend_pl.inference.pictures import open_picture, opened
from moextend_pl.inference.reduction import Reduction
from moextend_pl.inference.sounds import check_hears, heard
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.inference.streaming import stream
from moextend_pl.inference.token_merging import merged_count
from moextend_pl.moe.extension.reach import check_task
from moextend_pl.samples.collate import collate_generation
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.messages import Question, read_questions
from moextend_pl.samples.prompt import prompt_sample, to_device
from moextend_pl.training.answers import AnswerMixin

BATCH_SIZE = 16
"""Questions that are answered at a time."""


class AskMixin(AnswerMixin):
    """Gives a module that answers batches its methods for people."""

    @property
    @abstractmethod
    def plans(self) -> tuple[ExtensionPlan, ...]:
        """The extension plans of the built model."""

    @property
    @abstractmethod
    def generation(self) -> GenerationSpec:
        """How answers are generated where a question says nothing."""

    @abstractmethod
    def sample_spec(self) -> SampleSpec:
        """Returns what the model asks of its data."""

    @abstractmethod
    def answer(
        self, batch: Batch, spec: GenerationSpec | None = None, heard: Callable[[str], None] | None = None
    ) -> list[str]:
        """Generates one answer for each prompt of a batch; tells that of a single one piece by piece, if asked to."""

    def generate(
        self,
        asked: Any,
        question: str | Sequence[str] | None = None,
        task: str = "",
        *,
        sounds: Any = None,
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> str | list[str] | Iterator[str]:
        """Answers one question, or many.

        Args:
            asked: With a question: a picture, a path, an `https` or `data:` address, a list of them, or None for a
                question about text alone. Without: messages as OpenAI and transformers have them, for a conversation
                or with pictures between words.
            question: The question, without any image mark. A list of questions is answered in batches; `asked` is then
                one picture for all, or a list with an entry for each. Many conversations are a list of them in `asked`.
            task: Name of the task, where the model was extended for several.
            sounds: With a question, and a model that hears: bytes of a sound's file, a path or address of one, a list
                of them, or None. With many questions one sound for all, or a list with an entry for each.
            stream: Whether to return an iterator over the pieces of the answer, as they come; of one question.
            batch_size: How many are answered at a time; changes speed and memory, not the answers.
            options: What is to differ from the model's `generation`, see `GenerationSpec`.

        Returns:
            The answer, or a list of answers, or an iterator.

        Raises:
            UserError: If a question or an option cannot be used, a picture cannot be read, a prompt is longer than
                the model's context, or the model was extended for other tasks.

        Example:
            model.generate("shape.png", "what color is the shape?")
            model.generate(["left.png", "right.png"], "what differs?", max_new_tokens=64, temperature=0.7, seed=1)
            model.generate("shape.png", ["what color is the shape?", "is it a circle?"])
        """
        spec = self.generation.with_options(options)
        questions, one = read_questions(asked, question, sounds)
        if stream:
            if not one:
                raise UserError(f"Expected one question for `stream`, got {len(questions)}. Ask them one at a time.")
            return self.stream(questions[0], task, spec)
        answers = self.answers(questions, task, spec, batch_size)
        return answers[0] if one else answers

    def answers(
        self,
        questions: Sequence[Question],
        task: str = "",
        spec: GenerationSpec | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[str]:
        """Returns the answer to each question; arguments and mistakes as of `generate`."""
        if batch_size < 1:
            raise UserError(f"Expected `batch_size` of at least 1, got {batch_size}.")
        chosen = self.generation if spec is None else spec
        encoder, questions, lengths = self._check(questions, task, chosen)
        # Questions of like length stand together, so that little is padded.
        order = sorted(range(len(questions)), key=lambda place: lengths[place])
        found = [""] * len(questions)
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            batch = self._batch([questions[place] for place in places], encoder, task)
            for place, text in zip(places, self.answer(batch, chosen), strict=True):
                found[place] = text
        return found

    def stream(self, question: Question, task: str = "", spec: GenerationSpec | None = None) -> Iterator[str]:
        """Returns an iterator over the pieces of an answer; mistakes, as of `generate`, are raised at once."""
        chosen = self.generation if spec is None else spec
        if chosen.beams > 1:
            raise UserError("A stream has one beginning of an answer, got several `beams`. Leave out one of the two.")
        batch = self.prompt(question, task, chosen)
        return stream(lambda tell: self.answer(batch, chosen, tell))

    def prompt(self, question: Question, task: str = "", spec: GenerationSpec | None = None) -> Batch:
        """Returns a question as `answer` takes it; mistakes, as of `generate`, are raised at once."""
        encoder, questions, _ = self._check([question], task, self.generation if spec is None else spec)
        return self._batch(questions, encoder, task)

    def _check(
        self, questions: Sequence[Question], task: str, how: GenerationSpec
    ) -> tuple[ConversationEncoder, Sequence[Question], list[int]]:
        """Refuses what cannot be answered, before a picture is read where its size does not decide the length.

        Returns:
            The encoder; the questions, with pictures that had to be read; and the length of each prompt.
        """
        for question in questions:
            check_task(self.plans, task, bool(question.pictures))
        spec = self.sample_spec()
        check_hears(questions, spec)
        spec = replace(spec, tokens_per_image=merged_count(spec.tokens_per_image, Reduction.parse(how.reduce).rounds))
        encoder = ConversationEncoder(spec)
        questions, tiles = opened(questions, spec)
        lengths = [encoder.prompt_length(q.turns, each) for q, each in zip(questions, tiles, strict=True)]
        check_context(lengths, [f"The question {q.turns[-1].human[-60:]!r}" for q in questions], spec.context)
        return encoder, questions, lengths

    def _batch(self, questions: Sequence[Question], encoder: ConversationEncoder, task: str) -> Batch:
        self.eval()
        seen = [prompt_sample(encoder, one, [open_picture(place) for place in one.pictures]) for one in questions]
        samples = [heard(sample, encoder.spec, one.sounds) for sample, one in zip(seen, questions, strict=True)]
        batch = collate_generation(samples, encoder.pad_id)
        batch["tasks"] = [task] * len(samples)
        return to_device(batch, self.device)
