"""Entries of JSON files, one by one: keys, images, and all that is wrong with them."""

from __future__ import annotations

import base64
import binascii
import io
import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from datamodules.dialects import CONVERSATION_KEYS, spoken
from datamodules.members import check_name
from datamodules.scan import MAX_SAMPLE_BYTES
from datamodules.shards import Entry, key_problem, text_of
from datamodules.tar import BLOCK
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import decode_image, open_image
from moextend_pl.samples.turns import conversation_problems

LINES = (".jsonl", ".ndjson")
DIGITS = 9
"""Of the number that names an entry without an id."""

LONGEST_SHOWN = 100


@dataclass(frozen=True)
class Shrink:
    """What becomes of large images.

    Attributes:
        side: Shorter side in pixels that they become a JPEG of; None keeps all as they are.
        square: Whether they are stretched to a square of that side instead.
        quality: JPEG quality, 1 to 100.
    """

    side: int | None = None
    square: bool = False
    quality: int = 90


@dataclass(frozen=True)
class Made:
    """What became of an entry.

    Attributes:
        entry: None if it cannot be used.
        problems: All that is wrong with it.
        bytes_before: Bytes of its image files.
        dropped: What was left out of it, counted by what it was.
    """

    entry: Entry | None
    problems: list[str]
    bytes_before: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def read_annotations(path: Path) -> tuple[bytes, list[Any]]:
    """Returns content and entries of a JSON file with a list, or of JSON Lines with an entry a line.

    Raises:
        UserError: If it is missing, is no JSON, or holds no entry.
    """
    if not path.is_file():
        raise UserError(f"Expected a JSON or JSON Lines file at {path}, found none (cwd {Path.cwd()}).")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Windows begins files by a mark
        items = _lines(text, path) if path.suffix.lower() in LINES else json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        # A second value behind the first: an entry a line, whatever the file is called.
        if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
            raise UserError(f"{path}: expected UTF-8 JSON, got bytes that fail: {error}.") from error
        items = _lines(text, path)
    if isinstance(items, dict) and any(key in items for key in CONVERSATION_KEYS):
        items = [items]  # JSON Lines of one line
    if not isinstance(items, list) or not items:
        found = "an empty one" if isinstance(items, list) else type(items).__name__
        raise UserError(
            f"{path}: expected a list with at least one entry, got {found}. Give a list of entries, or an entry a line."
        )
    return data, items


def _lines(text: str, path: Path) -> list[Any]:
    """Reads JSON Lines; blank lines are passed over."""
    items = []
    for number, line in enumerate(text.split("\n"), 1):  # not `splitlines`, which cuts inside of texts too
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number}: expected one JSON entry, got text that fails: {error}. Write each entry "
                    "on one line, or all of them as one list."
                ) from error
    return items


def unique_keys(items: Sequence[Any]) -> tuple[list[str], int]:
    """Returns a key for each entry, '' where its id is not usable, and how many of them are not the entry's `id`.

    An entry without an id is named by its number. A dot becomes `_`, since WebDataset ends keys at it. An id that was
    seen before gets `-2`, `-3`, ... in the order of the file, past every number that makes the id of another entry.
    """
    identities = [
        f"{number:0{DIGITS}d}" if is_unnamed(item) else item.get("id") if isinstance(item, dict) else None
        for number, item in enumerate(items)
    ]
    texts = [str(i) if isinstance(i, (str, int)) and not isinstance(i, bool) else "" for i in identities]
    cleaned = [text.replace(".", "_") for text in texts]
    originals = set(cleaned)
    taken: set[str] = set()
    last: dict[str, int] = {}
    keys = []
    for text in cleaned:
        key = text
        while text and key in taken:
            last[text] = last.get(text, 1) + 1
            key = f"{text}-{last[text]}"
            if key in originals:
                key = text
        taken.add(key)
        keys.append(key)
    return keys, sum(key != text for key, text in zip(keys, texts, strict=True))


def is_unnamed(item: Any) -> bool:
    """Tells whether an entry has no id."""
    return isinstance(item, dict) and item.get("id") in (None, "")


def entry_name(item: Any) -> str:
    """Returns how messages call an entry."""
    return f"id {item.get('id')!r}" if isinstance(item, dict) else type(item).__name__


def make_entry(item: Any, key: str, root: Path, shrink: Shrink) -> Made:
    """Checks an entry and reads its images.

    Args:
        item: As it stands in the JSON file.
        key: Its unique key; '' if it has no usable id.
        root: Folder that image names start from.
        shrink: What becomes of large images.
    """
    if not isinstance(item, dict):
        return Made(None, ["expected an object with `id` and `conversations`"])
    wrong = key_problem(key) if key else f"expected `id` to be a text or a whole number, got {item.get('id')!r}"
    problems = [wrong] if wrong else []
    found = spoken(item)
    problems += found.problems
    images, before = [], 0
    for name in found.images:
        try:
            data = _read_image(root, name)
            before += len(data)
            images.append(prepared_image(data, _shown(name), shrink))
        except UserError as error:
            problems.append(str(error))
    problems += conversation_problems(found.conversations, len(found.images))
    if not problems:
        problems += _size_problems(found.conversations, images)
    made = None if problems else Entry(key, found.conversations, tuple(images))
    return Made(made, problems, before, dict(found.dropped))


def _size_problems(conversations: list[dict[str, str]], images: list[bytes]) -> list[str]:
    """Tells what a reader of the finished shard would refuse, before hours go into writing it."""
    try:
        size = len(text_of(conversations))
    except UserError as error:
        return [str(error)]
    size += sum(len(image) + 2 * BLOCK for image in images)  # each with its header, and filled up to whole blocks
    return [f"expected at most {MAX_SAMPLE_BYTES} bytes a sample, got {size}"] if size > MAX_SAMPLE_BYTES else []


def _read_image(root: Path, name: Any) -> bytes:
    if isinstance(name, dict):  # a cell of a table, as datasets of the hub hold pictures
        name = name.get("bytes") or name.get("path")
    if isinstance(name, bytes):
        return name
    if not isinstance(name, str):
        raise UserError(f"expected the name of an image, got {name!r}")
    if name.startswith("data:"):
        return _data_address(name)
    if "://" in name and not name.startswith("file://"):
        raise UserError(f"expected a file or a `data:` address, got {_shown(name)!r}; fetch it and name the file")
    path = root / check_name(_within(root, name.removeprefix("file://")))
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # reading a pipe would wait for ever
            raise UserError(f"expected an image at {path}, found a folder or a device there")
        if state.st_size > MAX_SAMPLE_BYTES:
            raise UserError(f"expected at most {MAX_SAMPLE_BYTES} bytes at {path}, found {state.st_size}")
        return path.read_bytes()
    except OSError as error:
        found = "found no file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"expected an image at {path}, {found}") from None


def _within(root: Path, name: str) -> str:
    """Returns an absolute name that lies in the folder of images as seen from there, others as they are."""
    place = PurePath(name)
    inside = place.is_absolute() and place.is_relative_to(root.absolute())
    return str(place.relative_to(root.absolute())) if inside else name


def _data_address(name: str) -> bytes:
    """Decodes `data:image/png;base64,...` (RFC 2397); the content says what it is."""
    head, _, body = name.partition(",")
    if not head.endswith(";base64") or len(body) > 4 * MAX_SAMPLE_BYTES // 3:
        raise UserError(f"expected `data:image/...;base64,` and at most {MAX_SAMPLE_BYTES} bytes, got {_shown(name)!r}")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise UserError(f"expected base64 in {_shown(name)!r}, got: {error}") from error


def _shown(name: Any) -> str:
    """Returns a name short enough for a message."""
    if not isinstance(name, str):
        return "the picture"
    return name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."


def prepared_image(data: bytes, name: str, shrink: Shrink) -> bytes:
    """Returns an image file as it goes into a shard, decoded once to be sure that it can be.

    Args:
        data: The file's content.
        name: Its name, for the error message.
        shrink: What becomes of a larger image.

    Raises:
        UserError: If it is damaged, too large, or of another format.
    """
    image = decode_image(data, name)
    side, size = shrink.side, open_image(data, name).size
    if side is None or (max(size) if shrink.square else min(size)) <= side:
        return data
    # Proportions are kept, so that a tower may squash, pad or crop as it likes.
    width, height = (side if shrink.square else side * length // min(image.size) for length in image.size)
    stream = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=shrink.quality)
    return stream.getvalue()
