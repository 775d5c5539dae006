"""Writing shards: plain tars that WebDataset reads, byte for byte the same for the same samples."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from datamodules.index import INDEX_FILE, MEMBER_NAME, Shard, build_index, check_name
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import decode_image, open_image
from moextend_pl.samples.turns import conversation_problems

SAMPLES_PER_SHARD = 1000
MAX_PROBLEMS = 20
MAX_NAME = 99
"""Longest member name, in bytes, that the tar format in use can hold."""

OURS = re.compile(r".*\.tar|\.?lengths-\w+\.npy(\.\d+\.tmp)?")
"""Shards, and lengths of samples (`lengths.py`), a half-written file of which a kill may have left."""

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class Entry:
    """One sample on its way into a shard.

    Attributes:
        key: Its name; no dots, so that every reader finds the same key.
        conversations: As LLaVA writes them.
        images: Content of its image files, in order.
    """

    key: str
    conversations: list[dict[str, str]]
    images: tuple[bytes, ...] = ()


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
    if out.exists() and not (out.is_dir() and (ours(out) or not any(out.iterdir()))):
        raise UserError(f"Expected {out} to be new, empty, or written by this command; it holds something else.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.part-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            old = out.parent / f".{out.name}.old-{os.getpid()}"
            out.replace(old)
            partial.replace(out)
            shutil.rmtree(old)
        else:
            partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_shard_folder(folder: Path) -> bool:
    """Tells whether a folder holds shards with what is written beside them, and nothing else."""
    names = [path.name for path in folder.iterdir()]
    return INDEX_FILE in names and all(name == INDEX_FILE or OURS.fullmatch(name) for name in names)


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
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for number, entry in enumerate(entries):
            if number % samples_per_shard == 0:
                stack.close()
                stream = stack.enter_context((folder / f"{number // samples_per_shard:05d}.tar").open("wb"))
                writer = stack.enter_context(TarWriter(stream, encoder=False, user="", group="", mtime=0))
            writer.write(_members(entry))
    return build_index(folder)


def _members(entry: Entry) -> dict[str, Any]:
    """Returns the sample as WebDataset wants it: extension -> bytes."""
    text = json.dumps({"conversations": entry.conversations}, ensure_ascii=False, separators=(",", ":"))
    sample: dict[str, Any] = {"__key__": entry.key, "json": text.encode("utf-8")}
    for number, data in enumerate(entry.images):
        suffix = SUFFIXES[str(open_image(data, entry.key).format)]
        sample[suffix if len(entry.images) == 1 else f"{number}.{suffix}"] = data
    problem = key_problem(entry.key)
    if problem:
        raise UserError(f"{problem}.")
    return sample


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


def build_from_llava(
    annotations: Path,
    image_root: Path,
    out: Path,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> list[Shard]:
    """Builds shards from a LLaVA JSON file; all or nothing.

    Args:
        annotations: List of `{"id", "image"?: name or names, "conversations"}`.
        image_root: Folder that the image names start from.
        out: Folder of shards to write.
        samples_per_shard: Samples of each shard but the last.
        progress: Wraps the list of entries, to show how far it got.

    Raises:
        UserError: With all problems of all entries, if there is any.
    """
    items = _read_annotations(annotations)
    problems: list[str] = []

    def entries() -> Iterator[Entry]:
        seen: set[str] = set()
        for number, item in enumerate(progress(items)):
            entry, found = _check_item(item, image_root, seen)
            problems.extend(f"entry {number} ({_name(item)}): {problem}" for problem in found)
            if entry is not None and not problems:
                yield entry
        if problems:
            raise UserError(_summary(annotations, problems))

    with replace_folder(out, is_shard_folder) as folder:
        return write_shards(entries(), folder, samples_per_shard)


def _read_annotations(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"Expected a LLaVA JSON file at {path}, found none (cwd {Path.cwd()}).")
    try:
        items = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected UTF-8 JSON, got bytes that fail: {error}.") from error
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: expected a list with at least one entry, got {type(items).__name__}.")
    return items


def _name(item: Any) -> str:
    return f"id {item.get('id')!r}" if isinstance(item, dict) else type(item).__name__


def _summary(path: Path, problems: list[str]) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:MAX_PROBLEMS])
    more = f"\n  ... and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return f"{path}: expected valid entries, got {len(problems)} problem(s). Mend them and build again.{shown}{more}"


def _check_item(item: Any, image_root: Path, seen: set[str]) -> tuple[Entry | None, list[str]]:
    """Returns the entry, or None, and all that is wrong with it."""
    if not isinstance(item, dict):
        return None, ["expected an object with `id` and `conversations`"]
    problems = []
    identity = item.get("id")
    key = str(identity) if isinstance(identity, (str, int)) and not isinstance(identity, bool) else ""
    wrong = key_problem(key) if key else "expected `id` to be a text or a number"
    if wrong:
        problems.append(wrong)
    elif key in seen:
        problems.append(f"the id {key!r} stands twice; give each entry an id of its own")
    seen.add(key)
    names = item.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    images = []
    for name in names:
        try:
            images.append(_read_image(image_root, name))
        except UserError as error:
            problems.append(str(error))
    problems += conversation_problems(item.get("conversations"), len(names))
    return (None if problems else Entry(key, item["conversations"], tuple(images))), problems


def _read_image(root: Path, name: Any) -> bytes:
    if not isinstance(name, str):
        raise UserError(f"expected the name of an image, got {name!r}")
    path = root / check_name(name)
    if not path.is_file():
        raise UserError(f"expected an image at {path}, found no file")
    data = path.read_bytes()
    decode_image(data, str(path))
    return data
