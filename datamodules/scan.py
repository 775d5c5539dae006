"""Indexing: what is in a tar file, found by reading its headers and texts once."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datamodules.foreign import MAX_TEXT_BYTES, conversations_of
from datamodules.index import Shard, file_sha256, save_index
from datamodules.keys import Keys
from datamodules.members import Member, is_image, is_text, is_used, split_member
from datamodules.tar import TarError, walk
from moextend_pl.contracts import UserError

SHOWN = 5
MAX_SAMPLE_BYTES = 256 * 2**20
"""Largest sample that is read into memory."""


@dataclass
class Found:
    """One sample of a tar file.

    Attributes:
        key: Its name.
        members: Its files, in the order in which they lie.
        texts: Content of its texts by extension.
        checksum: crc32 of the contents of its files in a row.
    """

    key: str
    members: list[Member] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    checksum: int = 0

    def take(self, stream: BinaryIO, offset: int, size: int) -> bytes:
        """Reads a member, counts it into the checksum, and returns its first bytes, enough for any text."""
        stream.seek(offset)
        head = piece = stream.read(min(size, MAX_TEXT_BYTES + 1))
        while piece:
            self.checksum, size = zlib.crc32(piece, self.checksum), size - len(piece)
            piece = stream.read(min(size, MAX_TEXT_BYTES))
        return head

    @property
    def images(self) -> int:
        """How many images it has."""
        return sum(is_image(member.extension) for member in self.members)


def index_shard(path: Path, faults: list[str] | None = None, skipped: Counter[str] | None = None) -> Shard:
    """Reads one tar file and returns its part of the index.

    Args:
        path: The file.
        faults: Takes a sentence for each sample whose text or size is wrong; the sample is indexed all the same and
            fails when it is read. If None, the first one is raised.
        skipped: Counts members that belong to no sample, by their extension.

    Raises:
        UserError: If the shard is damaged, a name is refused, a key stands twice, or a sample is wrong.
    """
    keys: list[str] = []
    turns: list[int] = []
    sums: list[int] = []
    counts: list[int] = [0]
    rows: list[tuple[int, int, int]] = []
    extensions: dict[str, int] = {}
    seen: set[str] = set()
    images = 0
    for found in walk_shard(path, Counter() if skipped is None else skipped):
        if found.key in seen or len({m.extension.lower() for m in found.members}) != len(found.members):
            raise UserError(f"{path}: key {found.key!r} stands twice. Give each sample a key of its own.")
        seen.add(found.key)
        keys.append(found.key)
        sums.append(found.checksum)
        turns.append(_turns(found, path, faults))
        counts.append(len(found.members))
        images += found.images
        rows += [(extensions.setdefault(m.extension, len(extensions)), m.offset, m.size) for m in found.members]
    return Shard(
        name=path.name,
        size=path.stat().st_size,
        sha256=file_sha256(path),
        keys=Keys.of(keys),
        turns=np.array(turns, dtype=np.int32),
        starts=np.cumsum(counts, dtype=np.int64),
        members=np.array(rows, dtype=np.int64).reshape(-1, 3),
        extensions=list(extensions),
        images=images,
        checksums=np.array(sums, dtype=np.uint32),
    )


def walk_shard(path: Path, skipped: Counter[str]) -> Iterator[Found]:
    """Yields the samples of a tar file, checks its structure, and counts what it passes over.

    Raises:
        UserError: If the file is no plain tar, is cut short, or a name is refused.
    """
    try:
        with path.open("rb") as stream:
            found = Found("")
            for item in walk(stream, path.stat().st_size):
                key, extension = split_member(item.name) or (found.key, "")
                if key != found.key:
                    if found.members:
                        yield found
                    found = Found(key)
                if not is_used(extension):
                    skipped[f".{extension}" if extension else "without a key"] += 1
                    continue
                found.members.append(Member(extension, item.offset, item.size))
                head = found.take(stream, item.offset, item.size)
                if is_text(extension):
                    found.texts[extension.lower()] = head[: MAX_TEXT_BYTES + 1]
            if found.members:
                yield found
    except (TarError, OSError) as error:
        raise UserError(f"{path}: not a whole plain tar file: {error}. Copy or build the shard again.") from error


def _turns(found: Found, path: Path, faults: list[str] | None) -> int:
    """Counts the turns of a sample; one that is wrong has one."""
    origin = f"{path}: {found.key}"
    first, last = found.members[0], found.members[-1]
    try:
        if last.offset + last.size - first.offset > MAX_SAMPLE_BYTES:
            raise UserError(f"{origin}: expected at most {MAX_SAMPLE_BYTES} bytes a sample, got more.")
        return max(len(conversations_of(found.texts, found.images, origin)) // 2, 1)
    except UserError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return 1


def build_index(
    folder: Path,
    faults: list[str] | None = None,
    shards: Iterable[Shard] | None = None,
    skipped: Counter[str] | None = None,
) -> list[Shard]:
    """Indexes every `*.tar` of a folder and writes the index beside them.

    Args:
        folder: Holds the shards.
        faults: As for `index_shard`.
        shards: What `index_shard` found in each, if that is known already.
        skipped: As for `index_shard`.

    Raises:
        UserError: If there is no shard, or a key stands in two shards.
    """
    if shards is None:
        shards = (index_shard(path, faults, skipped) for path in sorted(folder.glob("*.tar")))
    found = list(shards)
    if not any(len(shard) for shard in found):
        raise UserError(
            f"Expected samples in {folder / '*.tar'}, found {len(found)} shard(s) with none{_told(skipped)}. Give the "
            "folder that holds them."
        )
    owner: dict[str, str] = {}
    for shard in found:
        for key in shard.keys:
            if owner.setdefault(key, shard.name) != shard.name:
                raise UserError(f"{folder}: key {key!r} stands in {owner[key]} and {shard.name}; keys must differ.")
    save_index(folder, found)
    return found


def _told(skipped: Counter[str] | None) -> str:
    some = ", ".join(f"{count} {what!r}" for what, count in (skipped or Counter()).most_common(SHOWN))
    return f", but members that are skipped: {some}" if some else ""
