"""One sample by its number: seek, read, decode with explicit decoders. Nothing here unpickles or runs a shell."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.cache import Source
from datamodules.foreign import conversations_of
from datamodules.index import Shard, load_index
from datamodules.members import Member, image_order, is_image, is_sound, is_text
from datamodules.scan import MAX_SAMPLE_BYTES
from datamodules.streaming import StreamOptions
from datamodules.tar import BLOCK, belongs
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import Turn, lone_surrogate, parse_turns, single_turn

MAX_OPEN_SHARDS = 16
BYTES_OF_TURN = 256
"""What two texts and the object that holds them take beside their characters, about."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard, images and sounds not yet decoded.

    Attributes:
        key: Its name inside the shard set.
        turns: Questions and answers.
        images: Content of the image files, in order.
        origin: Shard and key, for messages.
        sounds: Content of the sound files, in order.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    origin: str
    sounds: tuple[bytes, ...] = ()

    def size(self) -> int:
        """Returns the bytes that it takes in memory, about."""
        texts = sum(len(turn.human) + len(turn.gpt) + BYTES_OF_TURN for turn in self.turns)
        return sum(map(len, (*self.images, *self.sounds))) + texts

    def single(self, position: int) -> RawSample:
        """Returns one turn as a sample of its own, with what belongs to it."""
        one, (images, sounds) = single_turn(self.turns, position, len(self.images), len(self.sounds))
        shown, heard = tuple(self.images[n] for n in images), tuple(self.sounds[n] for n in sounds)
        return RawSample(f"{self.key}#{position}", (one,), shown, self.origin, heard)


class ShardReader:
    """Reads samples of one shard folder by number.

    Reads are positional (`os.pread`), so that a handle inherited by a forked worker shares no file
    position; a pickled reader leaves its handles behind and opens its own.

    Args:
        place: Folder with shards and their index, or the address of a remote one.
        options: How remote folders are read.
        shards: Only these shards, as the index describes them; all of the index if None.

    Raises:
        UserError: If the folder has no valid index, or a shard is missing or differs from it in size.
    """

    def __init__(
        self, place: str | Path, options: StreamOptions | None = None, shards: Sequence[Shard] | None = None
    ) -> None:
        self.source = Source(place, options)
        self.shards = load_index(self.source) if shards is None else list(shards)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self._handles: OrderedDict[int, int] = OrderedDict()
        for shard in self.shards:
            self.source.check(shard.name, shard.size)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __reduce__(self) -> tuple[type[ShardReader], tuple[str, StreamOptions]]:
        return ShardReader, (str(self.source), self.source.options)  # an index may be large; the file is there

    @property
    def folder(self) -> Path | None:
        """The folder, None if it is a remote one."""
        return None if self.source.remote else Path(self.source.place)

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
        """Reads one sample by its number, counted over all shards of the folder.

        Raises:
            UserError: If the shard changed since it was indexed, or the sample is not valid.
        """
        where, position = self.locate(number)
        members = self.shards[where].sample(position)
        shard, key = self.describe(number)
        origin = f"{shard}: {key}"
        contents = self._contents(where, key, members, origin)
        sums = self.shards[where].checksums
        if sums is not None and _checksum(contents) != int(sums[position]):
            raise UserError(
                f"{origin}: expected the content that was indexed, got another one (crc32); the shard was changed or "
                "is damaged. Copy it again."
            )
        pairs = list(zip(members, contents, strict=True))
        texts = {member.extension.lower(): data for member, data in pairs if is_text(member.extension)}
        pairs = sorted((p for p in pairs if not is_text(p[0].extension)), key=lambda pair: image_order(pair[0]))
        images = tuple(data for member, data in pairs if is_image(member.extension))
        sounds = tuple(data for member, data in pairs if is_sound(member.extension))
        turns = parse_turns(conversations_of(texts, len(images), origin), len(images), origin, len(sounds))
        return RawSample(key=key, turns=turns, images=images, origin=origin, sounds=sounds)

    def describe(self, number: int) -> tuple[str, str]:
        """Returns shard and key of a sample without reading it.

        Raises:
            IndexError: If there is no such sample.
        """
        where, position = self.locate(number)
        return self.source.name(self.shards[where].name), self.shards[where].keys[position]

    def find(self, key: str) -> int | None:
        """Returns the number of the sample with a key, None if there is none."""
        if lone_surrogate(key) is not None:
            return None
        first = 0
        for shard in self.shards:
            if key.encode() in shard.keys.data[shard.keys.ends[0] : shard.keys.ends[-1]].tobytes():
                for position, other in enumerate(shard.keys):
                    if other == key:
                        return first + position
            first += len(shard)
        return None

    def close(self) -> None:
        """Closes all file handles; the next read opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def _contents(self, where: int, key: str, members: list[Member], origin: str) -> list[bytes]:
        """Reads the members of a sample, which lie side by side, in one go.

        Their headers are read with them and compared with the index: an image never meets the text of another.
        """
        first = min(member.offset for member in members) - BLOCK
        size = max(member.offset + member.size for member in members) - first
        if first < 0 or size > MAX_SAMPLE_BYTES + BLOCK:
            raise UserError(f"{origin}: expected at most {MAX_SAMPLE_BYTES} bytes a sample, got {size}.")
        block = os.pread(self._handle(where), size, first)
        if len(block) != size:
            raise UserError(f"{origin}: expected {size} bytes at byte {first}, got {len(block)}. Copy the shard again.")
        contents = []
        for member in members:
            start = member.offset - first
            if not belongs(block[start - BLOCK : start], f"{key}.{member.extension}", member.size):
                raise UserError(
                    f"{origin}: expected the header of {key}.{member.extension} at byte {member.offset - BLOCK}, got "
                    "something else; the shard is not the one that was indexed, or damaged. Copy it again."
                )
            contents.append(block[start : start + member.size])
        return contents

    def _handle(self, where: int) -> int:
        if where in self._handles:
            self._handles.move_to_end(where)
            return self._handles[where]
        while len(self._handles) >= MAX_OPEN_SHARDS:
            os.close(self._handles.popitem(last=False)[1])
        shard = self.shards[where]
        self._handles[where] = self.source.open(shard.name, shard.size, shard.sha256)
        return self._handles[where]


def _checksum(contents: list[bytes]) -> int:
    """Returns the crc32 of the members of a sample in a row."""
    value = 0
    for content in contents:
        value = zlib.crc32(content, value)
    return value
