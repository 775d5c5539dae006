"""LLaVA conversations as plain data: what a valid one is, and how one becomes single questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moextend_pl.contracts import UserError

IMAGE_MARK = "<image>"
"""Stands in a human turn where an image belongs."""

SOUND_MARK = "<sound>"
"""Stands in a human turn where a sound belongs."""

VIDEO_MARK, VIDEO_KEYS = "<video>", ("video", "videos")
"""What tells that a sample is about a video; it is refused, since a model would learn to speak of what it never saw."""

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Extensions of the images that may belong to a conversation, and the decoder of each."""

SOUND_FORMATS = ("wav", "flac", "mp3")
"""Extensions of the sounds that may belong to a conversation."""

ROLES = ("human", "gpt")
"""Who speaks, in turn."""

SYSTEM = "system"
"""Who may speak before all others."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        human: What is asked; holds one `<image>` or `<sound>` for each image or sound that comes with it.
        gpt: What is to be answered.
        system: Instruction that stands before the first question; empty if there is none.
    """

    human: str
    gpt: str
    system: str = ""


def without_marks(text: str) -> str:
    """Returns a text without the marks of images and sounds."""
    return text.replace(IMAGE_MARK, "").replace(SOUND_MARK, "")


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


def conversation_problems(conversations: Any, images: int, sounds: int = 0) -> list[str]:
    """Lists everything that is wrong with a conversation; an empty list means it is valid.

    Args:
        conversations: List of `{"from": "human" | "gpt", "value": text}`, as LLaVA writes it; the first may be
            from "system".
        images: How many images the sample has.
        sounds: How many sounds it has.
    """
    if not isinstance(conversations, list) or not conversations:
        return ["expected a list of turns under `conversations`, got none"]
    if isinstance(conversations[0], dict) and conversations[0].get("from") == SYSTEM:
        text, conversations = conversations[0].get("value"), conversations[1:]
        if not isinstance(text, str) or not text.strip() or without_marks(text) != text:
            return [f"expected a text without `{IMAGE_MARK}` or `{SOUND_MARK}` from {SYSTEM!r}, got {text!r}"]
        if (place := lone_surrogate(text)) is not None:
            return [f"expected whole characters from {SYSTEM!r}, got a lone surrogate at character {place}"]
    problems = []
    if not conversations or len(conversations) % 2:
        problems.append(f"expected an even number of turns (human, gpt, ...), got {len(conversations)}")
    marks = dict.fromkeys((IMAGE_MARK, SOUND_MARK), 0)
    for position, turn in enumerate(conversations):
        expected = ROLES[position % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected:
            got = turn.get("from") if isinstance(turn, dict) else type(turn).__name__
            problems.append(f"turn {position}: expected it from {expected!r}, got {got!r}")
            continue
        value = turn.get("value")
        if isinstance(value, str) and VIDEO_MARK in value:
            problems.append(f"turn {position}: `{VIDEO_MARK}` stands in the text; videos are not supported yet")
        if not isinstance(value, str) or not without_marks(value).strip():
            problems.append(f"turn {position}: expected a text, got {value!r}")
            continue
        if (place := lone_surrogate(value)) is not None:
            problems.append(f"turn {position}: expected whole characters, got a lone surrogate at character {place}")
        for mark in marks:
            if mark in value and expected == "gpt":
                problems.append(f"turn {position}: `{mark}` stands in an answer; it may stand in questions only")
            marks[mark] += value.count(mark)
    for mark, count, kind in ((IMAGE_MARK, images, "image"), (SOUND_MARK, sounds, "sound")):
        if marks[mark] != count:
            problems.append(f"{marks[mark]} `{mark}` in the text for {count} {kind}(s)")
    return problems


def parse_turns(conversations: Any, images: int, origin: str, sounds: int = 0) -> tuple[Turn, ...]:
    """Turns LLaVA's list into pairs.

    Raises:
        UserError: If the conversation is not valid.
    """
    problems = conversation_problems(conversations, images, sounds)
    if problems:
        raise UserError(f"{origin}: {'; '.join(problems)}. Mend the sample and build the shards again.")
    system = conversations[0]["value"] if conversations[0]["from"] == SYSTEM else ""
    values = [turn["value"] for turn in conversations[1 if system else 0 :]]
    turns = [Turn(human, gpt) for human, gpt in zip(values[::2], values[1::2], strict=True)]
    return (replace(turns[0], system=system), *turns[1:])


def single_turn(
    turns: tuple[Turn, ...], position: int, images: int, sounds: int = 0
) -> tuple[Turn, tuple[range, range]]:
    """Takes one turn out of its conversation, to stand alone.

    A turn that marks images or sounds keeps exactly those; a turn that marks none is given all of the
    sample, with their marks at its start. The conversation's system text goes with every turn.

    Returns:
        The turn, and the positions of its images and of its sounds among the sample's.
    """
    turn = replace(turns[position], system=turns[0].system)
    if without_marks(turn.human) == turn.human:
        marks = f"{IMAGE_MARK}\n" * images + f"{SOUND_MARK}\n" * sounds
        return replace(turn, human=marks + turn.human), (range(images), range(sounds))
    first = [sum(earlier.human.count(mark) for earlier in turns[:position]) for mark in (IMAGE_MARK, SOUND_MARK)]
    counts = (turn.human.count(IMAGE_MARK), turn.human.count(SOUND_MARK))
    return turn, (range(first[0], first[0] + counts[0]), range(first[1], first[1] + counts[1]))
