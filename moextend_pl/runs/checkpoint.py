"""Lightning's checkpoint files: written whole or not at all, the last two kept, and read only if undamaged.

One file a step, and no folder with a manifest beside: the archive that torch writes ends with the list of its entries
and their checksums, so that content, checksums and place change by one rename.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import sync_folder, write_atomically

CHECKPOINT_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
PREVIOUS_CHECKPOINT = "previous.ckpt"
PENDING_CHECKPOINT = f".{LAST_CHECKPOINT}.tmp"  # what a run that is killed leaves behind is cleaned up by that ending
KEPT = 3  # the two, and one that is being written

_log = logging.getLogger(__name__)


def take_place(newest: Path) -> None:
    """Makes a checkpoint the last one of its folder, and the last one the one before.

    A run that is killed in between goes on from the one before.
    """
    last = newest.with_name(LAST_CHECKPOINT)
    if last.exists():
        last.replace(newest.with_name(PREVIOUS_CHECKPOINT))
    newest.replace(last)
    sync_folder(last.parent)


def newest_valid(folder: Path) -> Path | None:
    """Returns the last checkpoint of a folder that can be read, or None if there is none.

    Raises:
        UserError: If there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for path in (folder / LAST_CHECKPOINT, folder / PREVIOUS_CHECKPOINT):
        if not path.exists():
            continue
        fault = damage(path)
        if fault is None:
            if damaged:
                _log.warning("damaged: %s; going on from the checkpoint before it, %s", damaged[0], path)
            return path
        damaged.append(f"'{path}' ({fault})")
    if damaged:
        raise UserError(
            f"expected a checkpoint that can be read, got only damaged ones: {', '.join(damaged)}. Restore one, give "
            "another with `--ckpt_path`, or begin anew with `--fresh`."
        )
    return None


def written_since(folder: Path, moment: float) -> bool:
    """Tells whether a folder holds a checkpoint that was written after a moment, in seconds since 1970."""
    kept = (folder / name for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT))
    return any(path.exists() and path.stat().st_mtime > moment for path in kept)


def drop_later(folder: Path, chosen: str | None) -> None:
    """Sets the last checkpoint of a run aside where the run goes on from the one before.

    It is damaged, or belongs to steps that are taken again, and would otherwise take the place of the good one.
    """
    last = folder / LAST_CHECKPOINT
    if chosen and Path(chosen).resolve() == (folder / PREVIOUS_CHECKPOINT).resolve() and last.exists():
        last.replace(last.with_name(f"{LAST_CHECKPOINT}.set_aside"))


def check_room(folder: Path, size: int) -> None:
    """Refuses a disk on which the checkpoints of a run have no room.

    Args:
        folder: Of the checkpoints.
        size: Bytes of one.

    Raises:
        UserError: If there is less room than needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(
        path.stat().st_size for path in (folder / LAST_CHECKPOINT, folder / PREVIOUS_CHECKPOINT) if path.exists()
    )
    needed, free = KEPT * size - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"expected {needed / 1e9:.1f} GB for {KEPT} checkpoints in {folder}, found {free / 1e9:.1f} GB free. Make "
            "room, or name another `trainer.default_root_dir`."
        )


def damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint file, by the checksums in it, which torch does not compare; else None."""
    try:
        with ZipFile(path) as file:
            wrong = file.testzip()
    except (OSError, EOFError, BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        return _first_line(error)
    if wrong:
        return f"checksum of {wrong}"
    return None if "state_dict" in peek(path) else "without `state_dict`"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"


def peek(path: Path) -> dict[str, Any]:
    """Returns what a checkpoint holds without reading its tensors; nothing if it is damaged, or no single file."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, EOFError, UnpicklingError, RuntimeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written into their own folder and moved into place.

    Lightning writes to the system's temporary folder first and then copies where that lies on another
    file system; a run killed during the copy leaves half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: Tensors and plain values.
            path: The final place, on a local file system.
            storage_options: Not supported, as in the base class.
        """
        assert storage_options is None, "storage_options is not supported for local checkpoints"
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Loads a checkpoint after comparing its bytes with the checksums in it, which torch does not do.

        Raises:
            UserError: If the file is damaged, or none of Lightning's.
        """
        fault = damage(Path(path))
        try:
            checkpoint: dict[str, Any] = {} if fault else super().load_checkpoint(path, *args, **options)
        except (OSError, EOFError, UnpicklingError, RuntimeError) as error:
            checkpoint, fault = {}, _first_line(error)
        if fault:
            raise UserError(
                f"expected a checkpoint of Lightning at '{path}', got a damaged or another file ({fault}). Give "
                "another `--ckpt_path`, or begin anew with `--fresh`."
            )
        return checkpoint
