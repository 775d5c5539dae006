"""Files that are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
WRITE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, *NO_PLACE)
NO_ROOM = 2**16
"""Bytes that are written to ask the system why a file could not be."""


def write_fault(error: BaseException | None) -> OSError | None:
    """Returns what the system said of a place that cannot be written to, among the causes of an error; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in WRITE_FAULTS:
            return error
        error = error.__cause__ or error.__context__
    return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut; the umask says who may read it.

    Args:
        path: The final place.
        write: Writes the content to the path it is given, in the same folder.

    Raises:
        OSError: If there is no room, whatever the writer calls that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps two runs from writing into one another's temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mode = _new_file(temporary)
        write(temporary)
        _settle(temporary, mode)
        temporary.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        # torch and safetensors tell of a full disk, a quota or a limit in words of their own.
        if not isinstance(error, OSError) and (fault := _refusal(temporary)):
            raise OSError(fault.errno, fault.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # on a disk that has become read-only
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder so that it is there whole or not at all; an older one leaves only when the new one is written.

    Args:
        path: The final place.
        write: Writes all files into the folder it is given, which lies beside that place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{name}.tmp") for name in (os.getpid(), "old"))
    try:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)
        temporary.mkdir()
        mode = _new_file(temporary / "mode")
        (temporary / "mode").unlink()
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _settle(file, mode)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)


def _new_file(path: Path) -> int:
    """Makes an empty file; returns the mode that the umask gives it, which cannot be asked for otherwise."""
    path.touch()
    return path.stat().st_mode


def _settle(path: Path, mode: int) -> None:
    """Gives a file its mode, where safetensors lets nobody else read it, and waits until it is on the disk."""
    with contextlib.suppress(OSError):  # some file systems know no modes
        path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refusal(path: Path) -> OSError | None:
    """Returns what the system says to some more bytes in a file, in place of a library that kept it to itself."""
    try:
        with path.open("ab") as file:
            file.write(bytes(NO_ROOM))
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def remove_leftovers(run: Path) -> None:
    """Deletes what a process that was killed while it wrote has left in a run directory.

    Args:
        run: Directory that no other process writes to.
    """
    for leftover in list(run.rglob(".*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that it is there whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Returns what a JSON file holds; nothing if it is not there, is damaged, or holds no mapping."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
