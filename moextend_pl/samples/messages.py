"""Questions as people ask them: pictures, sounds and a text, or messages as OpenAI and transformers have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_MARK, SOUND_MARK, Turn, without_marks

Picture = Image.Image | str | Path
"""A picture, or where it lies: a file, an `https` or a `data:` address."""

Sound = bytes | str | Path
"""A sound's file as bytes, or where it lies: as of a picture."""

UNKNOWN_ANSWER = "?"
"""Stands where the answer will be: a template is asked for a whole conversation."""

PICTURES_OR_NONE = "a picture, a path or address of one, a list of them, or None"
SOUNDS_OR_NONE = "bytes of a sound's file, a path or address of one, a list of them, or None"
FORM = 'messages such as {"role": "user", "content": "..."}'


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question.

    Attributes:
        turns: What was said; the last answer is not known yet.
        pictures: Those of all turns, in the order of their marks.
        sounds: Likewise.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    sounds: tuple[Sound, ...] = ()


def ask(
    text: str, pictures: Sequence[Picture] = (), earlier: Question | None = None, sounds: Sequence[Sound] = ()
) -> Question:
    """Returns a question with its pictures and sounds before it, as the data has them.

    Args:
        text: Without any mark.
        pictures: Of this question.
        earlier: The conversation that it goes on with, answered.
        sounds: Of this question.

    Raises:
        UserError: If the question is empty or holds a mark, which would ask for a picture or sound that nobody gave.
    """
    _check_text(text)
    before = earlier or Question(())
    marks = f"{IMAGE_MARK}\n" * len(pictures) + f"{SOUND_MARK}\n" * len(sounds)
    turn = Turn(marks + text, UNKNOWN_ANSWER)
    return Question((*before.turns, turn), (*before.pictures, *pictures), (*before.sounds, *sounds))


def read_questions(asked: Any, question: str | Sequence[str] | None, heard: Any = None) -> tuple[list[Question], bool]:
    """Reads what `generate` is asked.

    Args:
        asked: Pictures of a question, or with no question messages; for many at once a list of them.
        question: A question; a list of them for many at once; None where `asked` is messages.
        heard: Sounds of a question; for many at once a list of them; None where `asked` is messages.

    Returns:
        The questions, and whether only one was asked.

    Raises:
        UserError: If it is neither.
    """
    if question is None:
        if heard is not None:
            raise UserError("Expected sounds as parts of the messages, got `sounds` beside them. Put them there.")
        if not isinstance(asked, list | tuple) or not asked:
            raise UserError(f"Expected {FORM}, or a question beside the picture, got {type(asked).__name__} alone.")
        one = isinstance(asked[0], Mapping)
        return [read_messages(messages) for messages in ([asked] if one else asked)], one
    if isinstance(question, str):
        return [ask(question, _pictures(asked), sounds=_sounds(heard))], True
    shown, sounds = _entries(asked, len(question), "pictures"), _entries(heard, len(question), "sounds")
    each = zip(question, shown, sounds, strict=True)
    return [ask(text, _pictures(pictures), sounds=_sounds(some)) for text, pictures, some in each], False


def _entries(given: Any, questions: int, kind: str) -> Sequence[Any]:
    """Returns what each of many questions is about."""
    each = given if isinstance(given, list | tuple) else [given] * questions
    if len(each) != questions:
        raise UserError(
            f"Expected as many entries of {kind} as questions, got {len(each)} for {questions}; where a question "
            f"has several {kind}, its entry is a list, and None where it has none."
        )
    return each


def read_messages(messages: Any) -> Question:
    """Reads a conversation as OpenAI and transformers write it.

    Args:
        messages: From `system` (optional, first), `user` and `assistant` in turn, `user` last. A content is a text, or
            a list of parts: `{"type": "text", "text"}`, `{"type": "image", "image"}`, `{"type": "image_url",
            "image_url": {"url"}}`, `{"type": "audio", "audio"}`, `{"type": "input_audio", "input_audio": {"data"}}`;
            each part is a line, and a picture or sound stands where its part does.

    Raises:
        UserError: If it is no such conversation.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError(f"Expected {FORM}, got {type(messages).__name__}: {str(messages)[:80]!r}.")
    pictures: list[Picture] = []
    sounds: list[Sound] = []
    spoken = [(message.get("role"), _content(message, pictures, sounds)) for message in messages]
    system = spoken[0][1] if spoken and spoken[0][0] == "system" else ""
    rest = spoken[1:] if system else spoken
    expected = [("user", "assistant")[place % 2] for place in range(len(rest))]
    if [role for role, _ in rest] != expected or not len(rest) % 2:
        raise UserError(
            "Expected messages from 'user' and 'assistant' in turn, 'user' first and last and 'system' before all, "
            f"got {[role for role, _ in spoken]}."
        )
    texts = [text for _, text in rest] + [UNKNOWN_ANSWER]
    if marked := [text for text in (system, *texts[1::2]) if without_marks(text) != text]:
        raise UserError(f"Expected pictures and sounds in messages from 'user' only, got one in {marked[0]!r}.")
    turns = [Turn(human, gpt) for human, gpt in zip(texts[::2], texts[1::2], strict=True)]
    return Question((Turn(turns[0].human, turns[0].gpt, system), *turns[1:]), tuple(pictures), tuple(sounds))


def _pictures(given: Any) -> list[Picture]:
    return _listed(given, (Image.Image, str, Path), PICTURES_OR_NONE)


def _sounds(given: Any) -> list[Sound]:
    return _listed(given, (bytes, str, Path), SOUNDS_OR_NONE)


def _listed(given: Any, types: tuple[type, ...], expected: str) -> list[Any]:
    listed = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    for each in listed:
        if not isinstance(each, types):
            raise UserError(f"Expected {expected}, got {type(each).__name__}.")
    return listed


def _content(message: Mapping[str, Any], pictures: list[Picture], sounds: list[Sound]) -> str:
    """Returns the text of a message with marks for its pictures and sounds, which it adds to lists."""
    content = message.get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else None
    parts: Any = content if isinstance(content, list | tuple) and content else text or [content]
    lines = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _check_text(part["text"])
            lines.append(part["text"])
        elif kind in ("image", "image_url"):
            place = next((part[name] for name in ("image", "image_url", "url", "path") if part.get(name)), None)
            pictures += _pictures([place.get("url") if isinstance(place, Mapping) else place])
            lines.append(IMAGE_MARK)
        elif kind in ("audio", "input_audio"):
            sounds += _sounds([_sound_of(part)])
            lines.append(SOUND_MARK)
        else:
            raise UserError(
                "Expected a text as content of a message, or a list of parts of the types 'text', 'image', "
                f"'image_url', 'audio' and 'input_audio', got {str(part)[:80]!r}."
            )
    return "\n".join(lines)


def _sound_of(part: Mapping[str, Any]) -> Any:
    inline = part.get("input_audio")
    if isinstance(inline, Mapping) and isinstance(inline.get("data"), str):
        return f"data:audio/{inline.get('format', 'wav')};base64,{inline['data']}"
    return next((part[name] for name in ("audio", "url", "path") if part.get(name)), None)


def _check_text(text: str) -> None:
    if not text.strip():
        raise UserError("Expected a question, got an empty text.")
    if without_marks(text) != text:
        raise UserError(
            f"Expected a question without {IMAGE_MARK} and {SOUND_MARK}, got {text!r}. Leave the mark out: "
            "pictures and sounds are put before the question, or in messages where their part stands."
        )
