"""One sample by its number: seek, read, decode with explicit decoders. Nothing here unpickles or runs a shell."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.index import Member, image_order, load_index, parse_json
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import Turn, parse_turns

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest member that is read into memory."""

MAX_OPEN_SHARDS = 16


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard, images not yet decoded.

    Attributes:
        key: Its name inside the shard set.
        turns: Questions and answers.
        images: Content of the image files, in order.
        origin: Shard and key, for messages.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    origin: str


class ShardReader:
    """Reads samples of one shard folder by number.

    Reads are positional (`os.pread`), so that a handle inherited by a forked worker shares no file
    position; a pickled reader leaves its handles behind and opens its own.

    Args:
        folder: Holds the shards and their `index.json`.

    Raises:
        UserError: If the folder has no valid index, or a shard is missing or differs from it in size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.shards = load_index(self.folder)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self._handles: OrderedDict[int, int] = OrderedDict()
        for shard in self.shards:
            path = self.folder / shard.name
            if not path.is_file():
                raise UserError(f"Expected shard {path}, which the index lists; found no such file. Copy it there.")
            self._check_size(path, shard.size, path.stat().st_size)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}

    def turns(self) -> np.ndarray:
        """Returns the number of turns of each sample, (n,)."""
        return np.concatenate([shard.turns for shard in self.shards])

    def locate(self, number: int) -> tuple[int, int]:
        """Returns shard and position inside it of a sample.

        Raises:
            IndexError: If there is no such sample.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"Expected a sample number in [0, {len(self)}), got {number}.")
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - (int(self.ends[shard - 1]) if shard else 0)

    def read(self, number: int) -> RawSample:
        """Reads one sample.

        Args:
            number: Counts samples over all shards of the folder, from 0.

        Raises:
            UserError: If the shard changed since it was indexed, or the sample is not valid.
        """
        where, position = self.locate(number)
        shard = self.shards[where]
        key = shard.keys[position]
        origin = f"{self.folder / shard.name}: {key}"
        members = shard.sample(position)
        contents = self._contents(where, members, origin)
        texts = [data for member, data in zip(members, contents, strict=True) if member.extension == "json"]
        if len(texts) != 1:
            raise UserError(f"{origin}: expected one KEY.json, got {len(texts)}. Build the shards again.")
        pairs = [(m, data) for m, data in zip(members, contents, strict=True) if m.extension != "json"]
        images = tuple(data for _, data in sorted(pairs, key=lambda pair: image_order(pair[0])))
        turns = parse_turns(parse_json(texts[0], origin), len(images), origin)
        return RawSample(key=key, turns=turns, images=images, origin=origin)

    def close(self) -> None:
        """Closes all file handles; the next read opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def _contents(self, where: int, members: list[Member], origin: str) -> list[bytes]:
        """Reads the members of a sample, which lie side by side, in one go."""
        first = min(member.offset for member in members)
        size = max(member.offset + member.size for member in members) - first
        if size > MAX_MEMBER_BYTES:
            raise UserError(f"{origin}: expected at most {MAX_MEMBER_BYTES} bytes a sample, got {size}.")
        block = os.pread(self._handle(where), size, first)
        if len(block) != size:
            raise UserError(f"{origin}: expected {size} bytes at byte {first}, got {len(block)}. Copy the shard again.")
        return [block[member.offset - first : member.offset - first + member.size] for member in members]

    def _handle(self, where: int) -> int:
        if where in self._handles:
            self._handles.move_to_end(where)
            return self._handles[where]
        while len(self._handles) >= MAX_OPEN_SHARDS:
            os.close(self._handles.popitem(last=False)[1])
        path = self.folder / self.shards[where].name
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"Expected to read shard {path}, got: {error.strerror}.") from error
        self._handles[where] = handle
        self._check_size(path, self.shards[where].size, os.fstat(handle).st_size)
        return handle

    @staticmethod
    def _check_size(path: Path, expected: int, got: int) -> None:
        if expected != got:
            raise UserError(
                f"{path}: the index says {expected} bytes, the file has {got}. The shard was changed after it was "
                "indexed; copy or build it again."
            )
