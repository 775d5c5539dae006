"""What a user calls their data, recognised by its kind: files of conversations, tables, folders of pictures."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datamodules.dialects import CONVERSATION_KEYS, spoken
from datamodules.folders import read_folder
from datamodules.index import INDEX_FILE, file_sha256
from datamodules.llava_entries import LINES, read_annotations
from datamodules.tables import TABLES, entries_of, find_columns, read_csv, read_parquet
from moextend_pl.contracts import UserError

CONVERSATIONS = (".json", *LINES)
HELD_OUT = (8, 1000)
"""Fewest and most pictures that are held out."""

FORMS = "a .json, .jsonl, .csv, .tsv or .parquet file, or a folder of pictures"


@dataclass(frozen=True)
class OwnData:
    """Entries in LLaVA's form or another dialect, not yet checked.

    Attributes:
        place: File or folder that they come from.
        digest: Tells this content from another; pictures are not part of it.
        items: The entries.
        images: Folder that the image names start from.
        told: How they were read, a sentence each.
        dropped: What was left out already, counted by what it was.
    """

    place: Path
    digest: str
    items: list[Any]
    images: Path
    told: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def read_data(
    place: Path, images: Path | None = None, question: str | None = None, columns: Mapping[str, str] | None = None
) -> OwnData:
    """Reads the entries of a file or a folder; a folder with one such file in it is read by that file.

    Args:
        place: The file or folder.
        images: Folder that image names start from; the file's own if None.
        question: What every picture is asked where the data hold no question.
        columns: Column of a table for `picture`, `question` or `answer`; found by name if left out.

    Raises:
        UserError: If it is nothing that can be read, or has no entry.
    """
    if place.is_dir():
        file = _file_within(place)
        if file is None:
            items, dropped = read_folder(place, question)
            digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()
            return OwnData(place, digest, items, images or place, dropped=dropped)
        return read_data(file, images or place, question, columns)
    kind = place.suffix.lower()
    if kind not in (*CONVERSATIONS, *TABLES) or not place.is_file():
        found = "something else" if place.is_file() else "nothing"
        raise UserError(f"Expected {FORMS} at {place}, found {found} (cwd {Path.cwd()}).")
    images = images or place.parent
    if kind in CONVERSATIONS:
        data, items = read_annotations(place)
        digest = hashlib.sha256(data).hexdigest()
        keys = dict.fromkeys(key for item in items for key in (item if isinstance(item, dict) else CONVERSATION_KEYS))
        if any(key in keys for key in CONVERSATION_KEYS):
            return OwnData(place, digest, items, images)
        names, rows = list(keys), items
    else:
        names, rows = read_parquet(place) if kind == ".parquet" else read_csv(place)
        digest = file_sha256(place)
    if not rows:
        raise UserError(f"{place}: expected at least one row, got none.")
    found_columns = find_columns(names, columns or {}, place)
    digest = hashlib.sha256(json.dumps([digest, str(found_columns), question]).encode()).hexdigest()
    return OwnData(place, digest, entries_of(rows, found_columns, question), images, [f"columns: {found_columns}"])


def hold_out(data: OwnData) -> tuple[OwnData, OwnData]:
    """Divides data into what is learned from and what is measured on: every k-th picture with all that is asked of it.

    About one in twenty, at least `HELD_OUT[0]` if half of the data allow it, at most `HELD_OUT[1]`.

    Raises:
        UserError: If there are fewer than two pictures or texts.
    """
    groups: dict[str, int] = {}
    shown = [_first_picture(item, number) for number, item in enumerate(data.items)]
    for name in shown:
        groups.setdefault(name, len(groups))
    if len(groups) < 2:
        raise UserError(f"{data.place}: expected at least two pictures, to hold one out, got {len(groups)}. Add some.")
    wanted = min(max(len(groups) // 20, HELD_OUT[0]), HELD_OUT[1])
    step = max(len(groups) // wanted, 2)
    kept: tuple[list[Any], list[Any]] = ([], [])
    for name, item in zip(shown, data.items, strict=True):
        kept[groups[name] % step == step - 1].append(item)
    learned, measured = kept
    return replace(data, items=learned, digest=f"{data.digest} learned"), replace(
        data, items=measured, digest=f"{data.digest} measured", dropped=Counter()
    )


def _first_picture(item: Any, number: int) -> str:
    """Returns what tells the picture of an entry from others; entries without one are each their own."""
    names = spoken(item).images if isinstance(item, dict) else []
    name = names[0] if names else None
    if isinstance(name, dict):  # a cell of Parquet
        name = name.get("bytes") or name.get("path")
    if isinstance(name, bytes):
        name = hashlib.sha256(name).hexdigest()
    return name if isinstance(name, str) and name else f"\0{number}"


def _file_within(folder: Path) -> Path | None:
    """Returns the one file of a folder that describes its pictures, None if there is none.

    Raises:
        UserError: If there are several, or the folder holds shards.
    """
    if (folder / INDEX_FILE).is_file() or any(folder.glob("*.tar")):
        raise UserError(
            f"{folder} holds shards. Train on it as it is; if others wrote it, after `python -m moextend_pl shards "
            f"index {folder}`."
        )
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*CONVERSATIONS, *TABLES))
    if len(files) > 1:
        some = ", ".join(path.name for path in files[:5])
        raise UserError(f"{folder}: expected one file that describes the pictures, got {some}. Name the one to read.")
    return files[0] if files else None
