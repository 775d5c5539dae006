"""The folders that shards come from: a local one, or a remote one behind a cache on disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from pathlib import Path

import braceexpand
from filelock import FileLock

from datamodules.streaming import (
    LOCAL,
    ShardError,
    StreamOptions,
    download,
    download_text,
    scheme_of,
)
from moextend_pl.contracts import UserError

DIGEST = re.compile(r"[0-9a-f]{64}")
GIB = 2**30
SHARD_SUFFIX, MAX_SHARDS = ".tar", 1_000_000
EVICTION_LOCK = ".lock-room"
DEAD_AFTER = 3600.0
"""Seconds without a byte after which a partial download is a killed process's."""


class ShardCache:
    """Downloaded files under the names of their digests, so that one that is there is the right one.

    Several processes may share the folder: one downloads, the others wait for it. What is deleted to make
    room stays readable for those who have it open.

    Args:
        folder: Where files are kept; is made if needed.
        limit: Most bytes of all files. A download of another process under way may go beyond by its size.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, address: str, size: int, sha256: str, options: StreamOptions) -> int:
        """Returns an open handle of a file with this size and digest, after downloading it if needed.

        Raises:
            ShardError: If it cannot be fetched, is another file, or does not fit, or the folder cannot be used.
        """
        try:
            return self._open(address, size, sha256, options)
        except OSError as error:
            raise ShardError(
                f"Expected to keep downloads in {self.folder}, got: {error.strerror or error}. Give another folder as "
                "`cache_dir`."
            ) from error

    def _open(self, address: str, size: int, sha256: str, options: StreamOptions) -> int:
        path = self.folder / sha256
        while True:
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._bring(path, address, size, options)
                continue
            if os.fstat(handle).st_size == size:
                with contextlib.suppress(PermissionError):  # the file of another user
                    os.utime(handle)  # the age by which files are deleted
                return handle
            os.close(handle)
            path.unlink(missing_ok=True)

    def _bring(self, path: Path, address: str, size: int, options: StreamOptions) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Sixteen locks, not one a file, which would stay behind for ever.
        with FileLock(self.folder / f".lock-{path.name[0]}"):
            if path.exists():
                return
            self._make_room(size, address)
            partial = path.with_name(path.name + ".part")
            try:
                download(address, partial, size, path.name, options)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int, address: str) -> None:
        if size > self.limit:
            raise ShardError(
                f"{address}: has {size / GIB:.2f} GiB, the cache {self.folder} may hold {self.limit / GIB:.2f} GiB. "
                "Raise `cache_gib`."
            )
        with FileLock(self.folder / EVICTION_LOCK):
            kept = []
            for entry in os.scandir(self.folder):
                try:
                    state = entry.stat()
                except FileNotFoundError:  # another process has just finished or deleted it
                    continue
                if entry.name.endswith(".part") and state.st_mtime < time.time() - DEAD_AFTER:
                    Path(entry.path).unlink(missing_ok=True)
                elif DIGEST.fullmatch(entry.name):
                    kept.append((state.st_mtime_ns, state.st_size, Path(entry.path)))
            used = sum(length for _, length, _ in kept)
            for _, length, path in sorted(kept):
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= length


class Source:
    """A folder of shards, local or remote, or some shards of one.

    Args:
        place: Path, or address with an allowed scheme; a last part that ends with `.tar`, such as
            `{000000..000099}.tar`, names the shards.
        options: How remote folders are read.

    Raises:
        UserError: If the scheme is refused, or the pattern names shards of several folders.
    """

    def __init__(self, place: str | Path, options: StreamOptions | None = None) -> None:
        self.options = options or StreamOptions()
        text = str(place)
        self.remote = scheme_of(text) != LOCAL
        self.asked = text
        self.names: list[str] | None = None
        if text.endswith(SHARD_SUFFIX):
            text, self.names = named_shards(text)
        self.place = text.rstrip("/") if self.remote else str(Path(text.removeprefix("file://")))
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moextend_pl"
        folder = Path(self.options.cache_dir) if self.options.cache_dir else default
        self.cache = ShardCache(folder, int(self.options.cache_gib * GIB))

    def __str__(self) -> str:
        return self.place if self.names is None else self.asked

    def name(self, file: str) -> str:
        """Returns path or address of a file of the folder."""
        return f"{self.place}/{file}"

    def read_small(self, file: str, limit: int) -> bytes:
        """Returns the content of a small file, always as it is now.

        Raises:
            FileNotFoundError: If a local file is not there.
            ShardError: If it cannot be fetched, or is larger than `limit` bytes.
        """
        if self.remote:
            return download_text(self.name(file), limit, self.options)
        path = Path(self.name(file))
        if path.stat().st_size > limit:
            raise ShardError(f"{path}: expected at most {limit} bytes, got {path.stat().st_size}.")
        return path.read_bytes()

    def open(self, file: str, size: int, sha256: str) -> int:
        """Returns an open handle of a file that the index gives this size and digest.

        Raises:
            ShardError: If it cannot be read or fetched, or has another size.
        """
        if self.remote:
            return self.cache.open(self.name(file), size, sha256, self.options)
        try:
            handle = os.open(self.name(file), os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"Expected to read shard {self.name(file)}, got: {error.strerror}.") from error
        found = os.fstat(handle).st_size
        if found != size:
            os.close(handle)
            raise _other_size(self.name(file), size, found)
        return handle

    def check(self, file: str, size: int) -> None:
        """Checks that a local file is there and has its size; remote ones prove theirs when they come.

        Raises:
            ShardError: If it is missing or has another size.
        """
        if self.remote:
            return
        path = Path(self.name(file))
        try:
            found = path.stat().st_size
        except OSError:
            raise ShardError(
                f"Expected shard {path}, which the index lists; found no such file. Copy it there."
            ) from None
        if found != size:
            raise _other_size(str(path), size, found)


def named_shards(pattern: str) -> tuple[str, list[str]]:
    """Expands a pattern with braces into its folder and the names in it.

    Raises:
        UserError: If it cannot be expanded, names several folders, or too many shards.
    """
    try:
        places = list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"Expected braces in pairs, got {pattern!r}. Mend the pattern.") from error
    folders = {place.rpartition("/")[0] for place in places}
    if len(folders) > 1 or len(places) > MAX_SHARDS:
        found = f"{len(folders)} folders" if len(folders) > 1 else f"more than {MAX_SHARDS}"
        raise UserError(f"{pattern}: expected shards of one folder, got {found}. Name each folder in a list.")
    return folders.pop() or ".", [place.rpartition("/")[2] for place in places]


def _other_size(name: str, size: int, found: int) -> UserError:
    return ShardError(
        f"{name}: the index says {size} bytes, the file has {found}. The shard was changed after it was indexed; copy "
        "or build it again, or run `python -m moextend_pl shards index` on its folder."
    )
