"""Names of the files inside shards: KEY.json, KEY.txt, KEY.jpg, KEY.1.png, KEY.wav; nothing leads elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_FORMATS, SOUND_FORMATS, lone_surrogate

TEXTS = ("json", "txt")
"""Extensions of texts: LLaVA's conversations or facts with a caption, and a plain caption."""

MEMBER_NAME = re.compile(r"((?:[^/]+/)*[^/.]+)\.((?:[0-9]{1,6}\.)?[A-Za-z]+)")
"""KEY.EXTENSION or KEY.NUMBER.EXTENSION, as we write them; a key has no dot, so that WebDataset reads the same key."""

KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
FACTS = re.compile(r"__[^/]*__($|/)")
NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Member:
    """One file of a sample.

    Attributes:
        extension: What follows the key: `json`, `png`, `1.png`.
        offset: First byte of the content inside the shard.
        size: Bytes of the content.
    """

    extension: str
    offset: int
    size: int


def check_name(name: str) -> str:
    """Refuses names that lead out of their folder.

    Raises:
        UserError: If the name is empty, absolute, has a part `..`, or is no UTF-8.
    """
    if not name or name.startswith(("/", "~")) or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UserError(f"Expected a plain relative name, got {name!r}. Absolute names and `..` are refused.")
    if lone_surrogate(name) is not None:
        raise UserError(f"Expected a name in UTF-8, got {name!r}. Rename it.")
    return name


def split_member(name: str) -> tuple[str, str] | None:
    """Splits a member's name into key and extension by webdataset's rule: a key ends at the first dot of the last part.

    Returns:
        None for what webdataset passes over: names without a key, and its own facts.

    Raises:
        UserError: If the name is absolute or leads outside.
    """
    # https://github.com/webdataset/webdataset/blob/main/src/webdataset/tariterators.py, `base_plus_ext`
    match = None if FACTS.match(check_name(name)) else KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2]) if match else None


def is_used(extension: str) -> bool:
    """Tells whether a member belongs to a sample: `json`, `txt`, images as `png` or `0.png`, sounds alike; or not."""
    number, dot, kind = extension.lower().rpartition(".")
    if not dot:
        return kind in (*TEXTS, *IMAGE_FORMATS, *SOUND_FORMATS)
    return kind in (*IMAGE_FORMATS, *SOUND_FORMATS) and NUMBER.fullmatch(number) is not None


def is_text(extension: str) -> bool:
    """Tells whether a member is a text."""
    return extension.lower() in TEXTS


def is_sound(extension: str) -> bool:
    """Tells whether a member is a sound."""
    return extension.lower().rpartition(".")[2] in SOUND_FORMATS


def is_image(extension: str) -> bool:
    """Tells whether a member that is used is an image."""
    return not is_text(extension) and not is_sound(extension)


def image_order(member: Member) -> int:
    """Sorts KEY.0.png before KEY.1.png, and sounds alike; use as the key of `sorted`."""
    number = member.extension.partition(".")[0]
    return int(number) if number.isdigit() else 0
