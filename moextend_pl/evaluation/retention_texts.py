"""Texts and questions on which it is measured what a model still knows, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.question import read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Choice:
    """A question with several ends, one of which is right.

    Attributes:
        prompt: What stands before each end.
        ends: The ends.
        right: Place of the right one.
    """

    prompt: str
    ends: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class TextSet:
    """A file of texts or of questions.

    Attributes:
        name: Of the file, without its ending.
        documents: Texts to predict.
        choices: Questions to answer.
    """

    name: str
    documents: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Row:
    """A row of tokens, some of which are predicted.

    Attributes:
        ids: Tokens.
        first: Place of the first one that counts; those before it are only read.
    """

    ids: tuple[int, ...]
    first: int


def read_texts(path: Path) -> TextSet:
    """Reads texts: `.txt` is one text; a line of `.jsonl` is `{"text"}`, or a question with ends.

    A question is `{"question", "choices", "answer"}` with the answer as place or letter, or HellaSwag's
    `{"ctx", "endings", "label"}`.

    Raises:
        UserError: If there is no such file, or a line is none of these.
    """
    if not path.is_file():
        raise UserError(f"Expected texts at {path}, found no file. Name a .txt or .jsonl file.")
    if path.suffix != ".jsonl":
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise UserError(f"Expected a text in {path}, found none. Name another file.")
        return TextSet(path.stem, (text,), ())
    documents, choices = [], []
    for number, entry in enumerate(read_lines(path), start=1):
        if isinstance(entry.get("text"), str):
            documents.append(entry["text"])
        else:
            choices.append(_choice(entry, f"{path}: entry {number}"))
    if not documents and not choices:
        raise UserError(f"Expected texts or questions in {path}, found none. Name another file.")
    return TextSet(path.stem, tuple(documents), tuple(choices))


def read_all_texts(paths: Sequence[Path]) -> list[TextSet]:
    """Reads several files.

    Raises:
        UserError: As `read_texts`, and if two have one name, so that one number would stand for both.
    """
    found = [read_texts(path) for path in paths]
    names = [texts.name for texts in found]
    if len(set(names)) < len(names):
        raise UserError(f"Expected files of texts with names of their own, got {', '.join(names)}. Rename one.")
    return found


def _choice(entry: dict[str, Any], origin: str) -> Choice:
    names = ("ctx", "endings", "label") if "endings" in entry else ("question", "choices", "answer")
    prompt, ends, right = (entry.get(name) for name in names)
    if isinstance(right, str):
        right = int(right) if right.isdecimal() else LETTERS.find(right) if len(right) == 1 else -1
    fits = isinstance(prompt, str) and isinstance(ends, list) and all(isinstance(end, str) for end in ends)
    if not fits or not isinstance(right, int) or not 0 <= right < len(ends or ()):
        raise UserError(
            f"{origin}: expected `text`, or `question`, `choices` and `answer` (a place from 0 or a letter), got "
            f"{', '.join(entry)}."
        )
    return Choice(str(prompt), tuple(ends or ()), right)


def text_rows(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    """Cuts texts into rows so that every token but the first of a text is predicted exactly once.

    Args:
        documents: The texts.
        tokenizer: Of the model.
        length: Most tokens that are predicted in a row; the last token of the row before is read once more.
    """
    rows = []
    for text in documents:
        ids = tokenizer(text)["input_ids"]
        rows += [Row(tuple(ids[at : at + length + 1]), 1) for at in range(0, len(ids) - 1, length)]
    return rows


def choice_rows(choice: Choice, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Returns a row for each end of a question; a space is put between the two where none stands.

    Source: the loglikelihood requests of https://github.com/EleutherAI/lm-evaluation-harness.
    """
    prompt = choice.prompt.rstrip()
    before = tokenizer(prompt)["input_ids"]
    rows = []
    for end in choice.ends:
        ids = tokenizer(f"{prompt} {end.lstrip()}")["input_ids"]
        # A tokenizer may join the two: at least the last token is the end's.
        rows.append(Row(tuple(ids), min(len(before), len(ids) - 1)))
    return rows


def batches(rows: Sequence[Row], tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Groups rows of like length, padded on the right.

    Args:
        rows: Of any length.
        tokens: Most places of a batch, padding included; a single longer row is a batch of its own.

    Yields:
        Places of the rows, ids (B, S), attention mask (B, S), and which tokens count (B, S) in float32.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    group: list[int] = []
    for place in order:
        if group and (len(group) + 1) * len(rows[place].ids) > tokens:
            yield _padded(rows, group)
            group = []
        group.append(place)
    if group:
        yield _padded(rows, group)


def _padded(rows: Sequence[Row], places: list[int]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    longest = max(len(rows[place].ids) for place in places)
    ids, mask, counted = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(3))
    for number, place in enumerate(places):
        row = rows[place]
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
        counted[number, row.first : len(row.ids)] = 1
    return places, ids, mask, counted.float()
