"""Entries of LLaVA's JSON files, one by one: keys, images, and all that is wrong with them."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.members import check_name
from datamodules.scan import MAX_SAMPLE_BYTES
from datamodules.shards import Entry, key_problem, text_of
from datamodules.tar import BLOCK
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import decode_image, open_image
from moextend_pl.samples.turns import conversation_problems


@dataclass(frozen=True)
class Made:
    """What became of an entry.

    Attributes:
        entry: None if it cannot be used.
        problems: All that is wrong with it.
        bytes_before: Bytes of its image files.
    """

    entry: Entry | None
    problems: list[str]
    bytes_before: int = 0


def read_annotations(path: Path) -> tuple[bytes, list[Any]]:
    """Returns content and entries of a LLaVA JSON file.

    Raises:
        UserError: If it is missing, is no JSON, or holds no list with at least one entry.
    """
    if not path.is_file():
        raise UserError(f"Expected a LLaVA JSON file at {path}, found none (cwd {Path.cwd()}).")
    data = path.read_bytes()
    try:
        items = json.loads(data.decode("utf-8-sig"))  # Windows begins files by a mark
    except (ValueError, RecursionError) as error:
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        advice = f" If it is JSONL, an entry a line, convert it: `jq -s . {path.name} > list.json`." if lines else ""
        raise UserError(f"{path}: expected UTF-8 JSON, got bytes that fail: {error}.{advice}") from error
    if not isinstance(items, list) or not items:
        found = "an empty one" if isinstance(items, list) else type(items).__name__
        raise UserError(f"{path}: expected a list with at least one entry, got {found}. Give LLaVA's list of entries.")
    return data, items


def unique_keys(items: Sequence[Any]) -> tuple[list[str], int]:
    """Returns a key for each entry, '' where its id is not usable, and how many of them are not the entry's `id`.

    A dot becomes `_`, since WebDataset ends keys at it. An id that was seen before gets `-2`, `-3`, ... in the
    order of the file, past every number that makes the id of another entry.
    """
    identities = [item.get("id") if isinstance(item, dict) else None for item in items]
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


def entry_name(item: Any) -> str:
    """Returns how messages call an entry."""
    return f"id {item.get('id')!r}" if isinstance(item, dict) else type(item).__name__


def make_entry(item: Any, key: str, root: Path, side: int | None, quality: int) -> Made:
    """Checks an entry and reads its images.

    Args:
        item: As it stands in the JSON file.
        key: Its unique key; '' if it has no usable id.
        root: Folder that image names start from.
        side: As for `prepared_image`.
        quality: As for `prepared_image`.
    """
    if not isinstance(item, dict):
        return Made(None, ["expected an object with `id` and `conversations`"])
    wrong = key_problem(key) if key else f"expected `id` to be a text or a whole number, got {item.get('id')!r}"
    problems = [wrong] if wrong else []
    names = item.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    images, before = [], 0
    for name in names:
        try:
            data = _read_image(root, name)
            before += len(data)
            images.append(prepared_image(data, name, side, quality))
        except UserError as error:
            problems.append(str(error))
    problems += conversation_problems(item.get("conversations"), len(names))
    if not problems:
        problems += _size_problems(item["conversations"], images)
    return Made(None if problems else Entry(key, item["conversations"], tuple(images)), problems, before)


def _size_problems(conversations: list[dict[str, str]], images: list[bytes]) -> list[str]:
    """Tells what a reader of the finished shard would refuse, before hours go into writing it."""
    try:
        size = len(text_of(conversations))
    except UserError as error:
        return [str(error)]
    size += sum(len(image) + 2 * BLOCK for image in images)  # each with its header, and filled up to whole blocks
    return [f"expected at most {MAX_SAMPLE_BYTES} bytes a sample, got {size}"] if size > MAX_SAMPLE_BYTES else []


def _read_image(root: Path, name: Any) -> bytes:
    if not isinstance(name, str):
        raise UserError(f"expected the name of an image, got {name!r}")
    path = root / check_name(name)
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


def prepared_image(data: bytes, name: str, side: int | None, quality: int) -> bytes:
    """Returns an image file as it goes into a shard, decoded once to be sure that it can be.

    Args:
        data: The file's content.
        name: Its name, for the error message.
        side: Larger images become a JPEG of this side, stretched to a square as training does; None keeps all.
        quality: JPEG quality, 1 to 100.

    Raises:
        UserError: If it is damaged, too large, or of another format.
    """
    image = decode_image(data, name)
    if side is None or max(open_image(data, name).size) <= side:
        return data
    stream = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()
