"""What a person can do with the model that the quickstart made."""

from __future__ import annotations

import shlex
from pathlib import Path

EXAMPLE = "example.png"
QUESTION = "what color is the shape?"
NEXT = (
    ("ask it about a picture", ("generate", "--checkpoint", "{run}", "--image", "{picture}", "--prompt", "{question}")),
    ("talk with it", ("chat", "--checkpoint", "{run}", "--image", "{picture}")),
    ("talk with it on a web page, and see which experts answer", ("demo", "{run}")),
    ("look at every stage", ("report", "{out}")),
    ("a folder for transformers", ("export", "{run}", "--out", "{out}/exported")),
    ("a small folder to share", ("export", "{run}", "--target", "delta", "--out", "{out}/shared")),
    ("let other tools ask it", ("serve", "{run}")),
)


def next_commands(out: Path, picture: Path | None = None, question: str = QUESTION) -> list[tuple[str, str]]:
    """Returns purposes and command lines, ready for a shell.

    Args:
        out: Folder of a finished quickstart, or of stages of the same names.
        picture: To ask about; the quickstart's by default.
        question: What is asked about it.
    """
    places = {"run": str(out / "3_extend"), "out": str(out), "picture": str(picture or out / EXAMPLE)}
    places["question"] = question
    return [
        (purpose, shlex.join(["python", "-m", "moextend_pl", *(word.format(**places) for word in words)]))
        for purpose, words in NEXT
    ]
