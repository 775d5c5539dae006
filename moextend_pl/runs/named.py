"""Folders that are known by a name: that of a hub, whose cache is used first, or of a folder nearby."""

from __future__ import annotations

import os
import re
from pathlib import Path
from textwrap import shorten

from huggingface_hub import snapshot_download

from moextend_pl.contracts import UserError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)")
NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What a model, its tokenizer or a delta consists of; never code or pickles."""
CONFIGURATIONS = ("config.json", "encoder.json")
REASON = 200  # characters of another library's complaint


def name_of(folder: Path) -> tuple[str, str]:
    """Returns the name of a folder, `org/name` where it lies in the cache of a hub, and its revision there, or ""."""
    found = HUB_CACHE.search(str(folder))
    return (f"{found[1]}/{found[2]}", found[3]) if found else (folder.name, "")


def find_base(name: str, revision: str, near: Path) -> Path:
    """Finds a model by its name: beside a folder, in the working directory, then in the hub's cache or the hub.

    Args:
        name: Of a folder, or of a hub.
        revision: In the hub; empty for the newest.
        near: Folder in which the one that names it lies.

    Raises:
        UserError: If it is nowhere.
    """
    for place in (near / name, Path(name)):
        if any((place / file).is_file() for file in CONFIGURATIONS):
            return place
    if HUB_NAME.fullmatch(name):
        return from_hub(name, revision)
    raise UserError(
        f"Expected the base {name!r} in {near.resolve()} or here ({Path.cwd()}), found none. Say where it lies by "
        "`--base`, or in Python by `load(run, base=...)`."
    )


def from_hub(name: str, revision: str = "") -> Path:
    """Returns the folder of a hub's repository in its cache, fetched where it is not there.

    Args:
        name: `org/name`.
        revision: Empty for the newest.

    Raises:
        UserError: If it can be had neither from the cache nor from the hub.
    """
    endpoint, newest = os.environ.get("HF_ENDPOINT"), revision or None
    try:
        return Path(snapshot_download(name, revision=newest, allow_patterns=list(NEEDED), endpoint=endpoint))
    except Exception as error:  # the library, and the one below it that speaks HTTP, have dozens of exceptions
        reason = shorten(" ".join(str(error).split()), REASON)
        raise UserError(
            f"Expected {name!r} in the cache of the hub or in the hub itself, got: {reason} Correct the name, or "
            "give a folder."
        ) from error


def find_run(run: str | Path) -> Path:
    """Returns the folder of a run, or of a delta that a hub has.

    Args:
        run: Folder, or `org/name` where there is no such folder.

    Raises:
        UserError: As `from_hub`.
    """
    return from_hub(str(run)) if not Path(run).exists() and HUB_NAME.fullmatch(str(run)) else Path(run)
