"""LLaVA conversations as plain data: what a valid one is, and how one becomes single questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moextend_pl.contracts import UserError

IMAGE_MARK = "<image>"
"""Stands in a human turn where an image belongs."""

VIDEO_MARK, VIDEO_KEYS = "<video>", ("video", "videos")
"""What tells that a sample is about a video; it is refused, since a model would learn to speak of what it never saw."""

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Extensions of the images that may belong to a conversation, and the decoder of each."""

ROLES = ("human", "gpt")
"""Who speaks, in turn."""

SYSTEM = "system"
"""Who may speak before all others."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        human: What is asked; holds one `<image>` for each image shown with it.
        gpt: What is to be answered.
        system: Instruction that stands before the first question; empty if there is none.
    """

    human: str
    gpt: str
    system: str = ""


def lone_surrogate(text: str) -> int | None:
    """Returns where a text holds half a character, which JSON can write but UTF-8 and tokenizers cannot take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def video_problem(sample: Mapping[str, Any]) -> str | None:
    """Tells that a sample names a video, None if it does not."""
    named = next((key for key in VIDEO_KEYS if sample.get(key)), None)
    return f"expected images or texts, got a `{named}`; videos are not supported yet" if named else None


def conversation_problems(conversations: Any, images: int) -> list[str]:
    """Lists everything that is wrong with a conversation; an empty list means it is valid.

    Args:
        conversations: List of `{"from": "human" | "gpt", "value": text}`, as LLaVA writes it; the first may be
            from "system".
        images: How many images the sample has.
    """
    if not isinstance(conversations, list) or not conversations:
        return ["expected a list of turns under `conversations`, got none"]
    if isinstance(conversations[0], dict) and conversations[0].get("from") == SYSTEM:
        text, conversations = conversations[0].get("value"), conversations[1:]
        if not isinstance(text, str) or not text.strip() or IMAGE_MARK in text:
            return [f"expected a text without `{IMAGE_MARK}` from {SYSTEM!r}, got {text!r}"]
        if (place := lone_surrogate(text)) is not None:
            return [f"expected whole characters from {SYSTEM!r}, got a lone surrogate at character {place}"]
    problems = []
    if not conversations or len(conversations) % 2:
        problems.append(f"expected an even number of turns (human, gpt, ...), got {len(conversations)}")
    marks = 0
    for position, turn in enumerate(conversations):
        expected = ROLES[position % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected:
            got = turn.get("from") if isinstance(turn, dict) else type(turn).__name__
            problems.append(f"turn {position}: expected it from {expected!r}, got {got!r}")
            continue
        value = turn.get("value")
        count = value.count(IMAGE_MARK) if isinstance(value, str) else 0
        if isinstance(value, str) and VIDEO_MARK in value:
            problems.append(f"turn {position}: `{VIDEO_MARK}` stands in the text; videos are not supported yet")
        if not isinstance(value, str) or not (value.replace(IMAGE_MARK, "") if count else value).strip():
            problems.append(f"turn {position}: expected a text, got {value!r}")
            continue
        if (place := lone_surrogate(value)) is not None:
            problems.append(f"turn {position}: expected whole characters, got a lone surrogate at character {place}")
        if count and expected == "gpt":
            problems.append(f"turn {position}: `{IMAGE_MARK}` stands in an answer; it may stand in questions only")
        marks += count
    if marks != images:
        problems.append(f"{marks} `{IMAGE_MARK}` in the text for {images} image(s)")
    return problems


def parse_turns(conversations: Any, images: int, origin: str) -> tuple[Turn, ...]:
    """Turns LLaVA's list into pairs.

    Raises:
        UserError: If the conversation is not valid.
    """
    problems = conversation_problems(conversations, images)
    if problems:
        raise UserError(f"{origin}: {'; '.join(problems)}. Mend the sample and build the shards again.")
    system = conversations[0]["value"] if conversations[0]["from"] == SYSTEM else ""
    values = [turn["value"] for turn in conversations[1 if system else 0 :]]
    turns = [Turn(human, gpt) for human, gpt in zip(values[::2], values[1::2], strict=True)]
    return (replace(turns[0], system=system), *turns[1:])


def single_turn(turns: tuple[Turn, ...], position: int, images: int) -> tuple[Turn, range]:
    """Takes one turn out of its conversation, to stand alone.

    A turn that marks images keeps exactly those; a turn that marks none is given all images of the
    sample, with their marks at its start. The conversation's system text goes with every turn.

    Returns:
        The turn, and the positions of its images among the sample's.
    """
    turn = replace(turns[position], system=turns[0].system)
    marks = turn.human.count(IMAGE_MARK)
    if marks or not images:
        first = sum(earlier.human.count(IMAGE_MARK) for earlier in turns[:position])
        return turn, range(first, first + marks)
    return replace(turn, human=f"{IMAGE_MARK}\n" * images + turn.human), range(images)
