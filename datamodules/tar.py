"""Headers of tar files, read strictly: what is not a plain file with a plain name is refused.

Not Python's `tarfile`, which ends without a word at a damaged header, expands sparse files and reads extension
headers of any size. Formats: POSIX.1-2017 (pax, ustar) and GNU's long names, which is all that writers of shards use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENDED = 64 * 2**10
"""Largest extension header (pax records, long name) that is read, in bytes."""

MAX_TAIL = 2**20
"""Most bytes of padding after the end marker; GNU tar pads to 10 KiB."""

NAME_BYTES = 100
REGULAR, DIRECTORY = (b"0", b"\0"), b"5"
PAX, PAX_GLOBAL, LONG_NAME = b"x", b"g", b"L"
PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n]+)=")
NUMBER = re.compile(rb"[0-7]+")


class TarError(ValueError):
    """What is wrong with a tar file, without its name."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """One plain file inside a tar.

    Attributes:
        name: As its writer meant it, extension headers included.
        offset: First byte of the content; its own header block lies just before.
        size: Bytes of the content.
    """

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """One header block.

    Attributes:
        name: Name as it stands in the block, which holds at most 255 bytes of it.
        kind: Type flag.
        size: Bytes of the content.
    """

    name: bytes
    kind: bytes
    size: int


def parse_header(block: bytes) -> Header:
    """Reads one header block of 512 bytes.

    Raises:
        TarError: If the checksum is wrong, or a number is none.
    """
    if len(block) != BLOCK:
        raise TarError(f"expected a header of {BLOCK} bytes, got {len(block)}; the file is cut short")
    # The checksum is the sum of all bytes, with its own field counted as eight spaces.
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise TarError("the header's checksum is wrong")
    name = block[:NAME_BYTES].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return Header(prefix + b"/" + name if prefix else name, block[156:157], _number(block[124:136]))


def walk(stream: BinaryIO, total: int) -> Iterator[TarMember]:
    """Yields the plain files of a tar in the order in which they lie, and reads nothing but headers.

    Args:
        stream: The file, seekable; may be moved between steps.
        total: Bytes of the file.

    Raises:
        TarError: If a member is no plain file (directories are passed over), a header is damaged, or the file does
            not go on to the end marker.
    """
    place = 0
    name: str | None = None
    size: int | None = None
    while True:
        block = _read(stream, place, BLOCK)
        if block == bytes(BLOCK):
            _check_end(stream, place, total)
            return
        try:
            header = parse_header(block)
        except TarError as error:
            raise TarError(f"byte {place}: {error}") from None
        start, content = place + BLOCK, header.size if size is None else size
        place = start + -(-content // BLOCK) * BLOCK
        if place > total:
            raise TarError(f"byte {start}: a member of {content} bytes, but the file ends at byte {total}; cut short")
        if header.kind in (PAX, PAX_GLOBAL, LONG_NAME):
            extended, longer = _extension(header.kind, _extended(stream, start, content))
            name, size = extended or name, size if longer is None else longer
            continue
        if header.kind in REGULAR:
            yield TarMember(_text(header.name) if name is None else name, start, content)
        elif header.kind != DIRECTORY or content:
            raise TarError(
                f"byte {start - BLOCK}: member {name or header.name!r} is no regular file; links, devices and sparse "
                "files are refused"
            )
        name = size = None


def belongs(block: bytes, name: str, size: int) -> bool:
    """Tells whether the block before a content is its header; what a block cannot hold of a name is not compared."""
    try:
        header = parse_header(block)
    except TarError:
        return False
    # Longer names and those beyond ASCII stand in an extension header, the block has a stand-in.
    known = {name.encode("utf-8"), name.encode("utf-8")[:NAME_BYTES], name.encode("ascii", "replace")[:NAME_BYTES]}
    return header.kind in REGULAR and header.size == size and header.name in known


def _read(stream: BinaryIO, place: int, count: int) -> bytes:
    stream.seek(place)
    return stream.read(count)


def _extended(stream: BinaryIO, place: int, size: int) -> bytes:
    if size > MAX_EXTENDED:
        raise TarError(f"byte {place}: expected an extension header of at most {MAX_EXTENDED} bytes, got {size}")
    return _read(stream, place, size)


def _extension(kind: bytes, data: bytes) -> tuple[str | None, int | None]:
    """Returns name and size that an extension header gives to the next member, None for what it leaves alone."""
    if kind == LONG_NAME:
        return _text(data.partition(b"\0")[0]), None
    records = _pax_records(data)
    if any(key.startswith(b"GNU.sparse") for key in records) or (kind == PAX_GLOBAL and records.keys() & _PLACING):
        raise TarError("an extension header makes a sparse file, or places many members at once; both are refused")
    size = records.get(b"size")
    if size is not None and not re.fullmatch(rb"[0-9]{1,18}", size):
        raise TarError(f"an extension header gives the size {size[:20]!r}")
    path = records.get(b"path")
    return None if path is None else _text(path), None if size is None else int(size)


_PLACING = frozenset((b"path", b"size"))


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Splits records of a length, a space, `key=value` and a line's end; the length counts all of it."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(data):
        match = PAX_RECORD.match(data, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarError("an extension header is no list of pax records")
        records[match[2]] = data[match.end() : end - 1]
        place = end
    return records


def _check_end(stream: BinaryIO, place: int, total: int) -> None:
    """Only the end marker, two blocks of zeros, proves that the file is whole."""
    rest = total - place
    if rest < 2 * BLOCK:
        raise TarError(f"expected the end marker at byte {place}, got {rest} bytes; the file is cut short")
    if rest > MAX_TAIL or _read(stream, place, MAX_TAIL).strip(b"\0"):
        raise TarError(f"expected zeros after the end marker at byte {place}, got {rest} bytes of something else")


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError(f"expected a name in UTF-8, got {name[:40]!r}") from None


def _number(field: bytes) -> int:
    """Reads a number: octal digits, or base 256 where the first bit is set."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits and not NUMBER.fullmatch(digits):
        raise TarError(f"expected an octal number, got {field!r}")
    return int(digits, 8) if digits else 0
