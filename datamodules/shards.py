"""Writing shards: plain tars that WebDataset reads, byte for byte the same for the same samples."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from datamodules.foreign import MAX_TEXT_BYTES
from datamodules.index import ARRAYS_FILE, INDEX_FILE, Shard
from datamodules.members import MEMBER_NAME, check_name
from datamodules.scan import build_index
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import open_image
from moextend_pl.samples.sound.waveform import sound_suffix

SAMPLES_PER_SHARD = 1000
MAX_NAME = 99
"""Longest member name, in bytes, that the tar format in use can hold."""

OURS = re.compile(r".*\.tar|\.?lengths-\w+\.npy(\.\d+\.tmp)?")
"""Shards, and lengths of samples (`lengths.py`), a half-written file of which a kill may have left."""

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""MPO is what Pillow calls a JPEG with a second picture behind it, as phones take them."""

SKIPPED_FILE = "skipped.jsonl"
"""Lists the entries that a build has left out, if it was told to."""


@dataclass(frozen=True)
class Entry:
    """One sample on its way into a shard.

    Attributes:
        key: Its name; no dots, so that every reader finds the same key.
        conversations: As LLaVA writes them.
        images: Content of its image files, in order.
        sounds: Content of its sound files, in order.
    """

    key: str
    conversations: list[dict[str, str]]
    images: tuple[bytes, ...] = ()
    sounds: tuple[bytes, ...] = ()


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Returns pairs of question and answer in LLaVA's form."""
    return [
        {"from": role, "value": value} for turn in turns for role, value in zip(("human", "gpt"), turn, strict=True)
    ]


@contextlib.contextmanager
def replace_folder(out: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives a temporary sibling of a folder; it takes the folder's place if all goes well, else it vanishes.

    Args:
        out: The folder to write.
        ours: Tells whether an existing, filled folder was written by us and may be replaced.

    Raises:
        UserError: If the folder holds something else.
    """
    out = out.absolute()
    check_free(out, ours)
    partial = out.parent / f".{out.name}.part-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        take_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path, ours: Callable[[Path], bool]) -> None:
    """Makes sure that a folder may be written.

    Raises:
        UserError: If it holds something that is not ours.
    """
    if out.exists() and not (out.is_dir() and (ours(out) or not any(out.iterdir()))):
        raise UserError(f"Expected {out} to be new, empty, or written by this command; it holds something else.")


def take_place(partial: Path, out: Path) -> None:
    """Puts a finished folder where an older one may be, which is deleted then."""
    if not out.exists():
        partial.replace(out)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    out.replace(old)
    partial.replace(out)
    shutil.rmtree(old)


def is_shard_folder(folder: Path) -> bool:
    """Tells whether a folder holds shards with what is written beside them, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    others = names - {INDEX_FILE, ARRAYS_FILE, SKIPPED_FILE}
    return INDEX_FILE in names and all(OURS.fullmatch(name) for name in others)


def write_shards(entries: Iterable[Entry], folder: Path, samples_per_shard: int = SAMPLES_PER_SHARD) -> list[Shard]:
    """Writes samples as `00000.tar`, `00001.tar`, ... and their index into a folder.

    Args:
        entries: Samples, already checked.
        folder: Where to write; must exist.
        samples_per_shard: Samples of each shard but the last.

    Raises:
        UserError: If a key cannot be a name, an image is of no known kind, or there is no sample.
    """
    if samples_per_shard < 1:
        raise UserError(f"Expected at least 1 sample a shard, got {samples_per_shard}.")
    rest = iter(entries)
    for number in itertools.count():
        part = itertools.islice(rest, samples_per_shard)
        if not write_shard(folder / f"{number:05d}.tar", part):
            break
    return build_index(folder)


def write_shard(path: Path, entries: Iterable[Entry]) -> int:
    """Writes one tar file, none if there is no sample, and returns how many samples it holds.

    Raises:
        UserError: If a key cannot be a name, or an image or a sound is of no known kind.
    """
    count = 0
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for entry in entries:
            if writer is None:
                stream = stack.enter_context(path.open("wb"))
                writer = stack.enter_context(TarWriter(stream, encoder=False, user="", group="", mtime=0))
            writer.write(_members(entry))
            count += 1
    return count


def _members(entry: Entry) -> dict[str, Any]:
    """Returns the sample as WebDataset wants it: extension -> bytes."""
    sample: dict[str, Any] = {"__key__": entry.key, "json": text_of(entry.conversations)}
    for number, data in enumerate(entry.images):
        suffix = SUFFIXES[str(open_image(data, entry.key).format)]
        sample[suffix if len(entry.images) == 1 else f"{number}.{suffix}"] = data
    for number, data in enumerate(entry.sounds):
        suffix = sound_suffix(data, entry.key)
        sample[suffix if len(entry.sounds) == 1 else f"{number}.{suffix}"] = data
    problem = key_problem(entry.key)
    if problem:
        raise UserError(f"{problem}.")
    return sample


def text_of(conversations: list[dict[str, str]]) -> bytes:
    """Returns the content of KEY.json.

    Raises:
        UserError: If anything in it cannot be written as UTF-8, or it is too large to be read again.
    """
    text = json.dumps({"conversations": conversations}, ensure_ascii=False, separators=(",", ":"))
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("expected whole characters in every field of `conversations`, got a lone surrogate.") from error
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"expected at most {MAX_TEXT_BYTES} bytes of `conversations`, got {len(data)}.")
    return data


def key_problem(key: str) -> str | None:
    """Tells what is wrong with a key, None if nothing is."""
    try:
        check_name(key)
    except UserError as error:
        return str(error).rstrip(".")
    if not MEMBER_NAME.fullmatch(f"{key}.json"):
        return f"expected an id without dots and empty parts, got {key!r}"
    if len(f"{key}.999.webp".encode()) > MAX_NAME:
        return f"expected an id of at most {MAX_NAME - 9} bytes, got {key!r}"
    return None
