"""How others write conversations, as LLaVA writes them: OpenAI's messages, ShareGPT's roles, and what stands askew.

Each rule is told in docs/data.md. What a rule leaves out is counted, so that a build can tell it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from moextend_pl.samples.turns import IMAGE_MARK, ROLES, SYSTEM, video_problem

SPEAKERS = {"human": ROLES[0], "user": ROLES[0], "gpt": ROLES[1], "assistant": ROLES[1], "system": SYSTEM}
"""LLaVA's name of everyone who may speak."""

CONVERSATION_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("image", "images")

UNASKED = "answers before the first question"
UNANSWERED = "questions without an answer, at the end"
UNSHOWN = "images of questions without an answer"
UNTOLD = "empty system texts"


@dataclass
class Spoken:
    """An entry in LLaVA's form, not yet checked turn by turn.

    Attributes:
        conversations: Turns `{"from", "value"}`; whatever stood there if it was no list.
        images: Names, paths or `data:` addresses, in order.
        dropped: How much was left out, by what it was.
        problems: What no rule covers.
    """

    conversations: Any
    images: list[Any]
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def spoken(item: dict[str, Any]) -> Spoken:
    """Reads an entry by the rules of all dialects; one in LLaVA's form stays as it is."""
    listed = [key for key in CONVERSATION_KEYS if item.get(key) is not None]
    shown = [key for key in IMAGE_KEYS if item.get(key)]
    turns = item[listed[0]] if listed else None
    found = Spoken(turns, _names(item[shown[0]]) if shown else [])
    for keys in (listed, shown):
        if len(keys) > 1:
            found.problems.append(f"expected one of `{'`, `'.join(keys)}`, got both")
    if video := video_problem(item):
        found.problems.append(video)
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        found.conversations = [_turn(turn, found) for turn in turns]
        _trim(found)
    return found


def _names(value: Any) -> list[Any]:
    """Returns images as a list; an empty name, as LLaVA writes it for texts, is no image."""
    return [name for name in value if name not in ("", None)] if isinstance(value, list) else [value]


def _turn(turn: dict[str, Any], found: Spoken) -> dict[str, Any]:
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if turn.get("tool_calls"):
        found.problems.append("expected questions and answers, got a message with `tool_calls`")
    if isinstance(value, list):
        value = _joined(value, found)
    rest = {key: text for key, text in turn.items() if key not in ("role", "content")}
    return {**rest, "from": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "value": value}


def _joined(parts: list[Any], found: Spoken) -> str:
    """Returns OpenAI's parts as one text, a line each; an image becomes a mark where it stands."""
    lines = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif kind in ("image_url", "image"):
            address = part.get(kind)
            found.images.append(address.get("url") if isinstance(address, dict) else address)
            lines.append(IMAGE_MARK)
        else:
            found.problems.append(f"expected parts of the types `text`, `image_url` and `image`, got {kind!r}")
    return "\n".join(lines)


def _trim(found: Spoken) -> None:
    """Leaves out what has no question or no answer at either end, with its images, and system texts that are empty."""
    turns: list[dict[str, Any]] = found.conversations
    system, turns = (turns[:1], turns[1:]) if turns and turns[0]["from"] == SYSTEM else ([], turns)
    if system and system[0]["value"] in ("", None):
        found.dropped[UNTOLD] += 1
        system = []
    while turns and turns[0]["from"] == ROLES[1] and IMAGE_MARK not in str(turns[0]["value"]):
        found.dropped[UNASKED] += 1
        turns = turns[1:]
    while turns and turns[-1]["from"] == ROLES[0]:
        marks = str(turns[-1]["value"]).count(IMAGE_MARK)
        found.dropped[UNANSWERED] += 1
        if marks:
            found.dropped[UNSHOWN] += marks
            found.images = found.images[: max(len(found.images) - marks, 0)]
        turns = turns[:-1]
    found.conversations = [*system, *turns]
