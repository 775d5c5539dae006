"""A question of a test set, and the files that test sets are published in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moextend_pl.contracts import UserError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """One question, as a model is asked it.

    Attributes:
        key: Name in its set; the same in every run, so that runs can be compared.
        prompt: Text that the model is asked, without an image mark.
        truth: What the metric of the task needs to know; plain data.
        picture: Path of the picture, a `data:` address that holds it, or empty for none.
        group: Questions that are only whole together; empty where a question stands alone.
    """

    key: str
    prompt: str
    truth: Any
    picture: str = ""
    group: str = ""


def find(folder: Path, *names: str, says: str) -> Path:
    """Returns the first of some files or folders that is there.

    Args:
        folder: Of the test set.
        names: Relative paths, as the set is published and as others lay it out.
        says: What it is, for the error message.

    Raises:
        UserError: If none is there.
    """
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"Expected {says} at {folder / names[0]}, found nothing. Unpack the published files there.")


def read(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        UserError: If it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got text that fails: {error}. Download it again.") from error


def read_lines(path: Path, size: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the entries of a file with one JSON object a line.

    Args:
        path: The file.
        size: Bytes of it that count; None for all.

    Raises:
        UserError: If a line is none.
    """
    for number, line in enumerate(path.read_bytes()[:size].split(b"\n"), start=1):
        if line.strip():
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError) as error:
                said = line[:40].decode("utf-8", "backslashreplace")
                raise UserError(f"{path}:{number}: expected a JSON object on each line, got {said!r}.") from error


def lettered(options: Iterable[str]) -> str:
    """Returns options as lines of a prompt, `A. red` and so on."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))
