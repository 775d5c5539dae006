"""The index beside the shards: where each sample lies, so that any sample can be read at once.

`index.json` holds a schema number and, for each shard, its name, size, sha256 and samples; a sample
is `[key, turns, [extension, offset, size, ...]]`, with extensions written as positions in the shard's
list `extensions`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import IMAGE_FORMATS

INDEX_SCHEMA = 1
INDEX_FILE = "index.json"
MEMBER_NAME = re.compile(r"((?:[^/]+/)*[^/.]+)\.((?:[0-9]+\.)?[a-z]+)")
"""KEY.EXTENSION or KEY.NUMBER.EXTENSION; a key has no dot, so that WebDataset reads the same key."""

TAR_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One file of a sample.

    Attributes:
        extension: What follows the key: `json`, `png`, `1.png`.
        offset: First byte of the content inside the shard.
        size: Bytes of the content.
    """

    extension: str
    offset: int
    size: int


@dataclass
class Shard:
    """One tar file; samples are kept in arrays, since there may be millions.

    Attributes:
        name: File name inside its folder.
        size: Bytes of the file.
        sha256: Digest of the file.
        keys: n names.
        turns: (n,) turns of each sample.
        starts: (n + 1,) sample i owns rows `starts[i]:starts[i + 1]` of `members`.
        members: (m, 3) extension, offset and size.
        extensions: Names of the extensions that `members` refers to.
    """

    name: str
    size: int
    sha256: str
    keys: list[str]
    turns: np.ndarray
    starts: np.ndarray
    members: np.ndarray
    extensions: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, position: int) -> list[Member]:
        """Returns the members of one sample, in the order in which they lie in the shard."""
        rows = self.members[self.starts[position] : self.starts[position + 1]].tolist()
        return [Member(self.extensions[extension], offset, size) for extension, offset, size in rows]

    def to_dict(self) -> dict[str, Any]:
        """Returns the shard as plain lists, ready for JSON."""
        bounds = self.starts.tolist()
        rows = self.members.tolist()
        samples = [
            [key, turns, [number for row in rows[bounds[i] : bounds[i + 1]] for number in row]]
            for i, (key, turns) in enumerate(zip(self.keys, self.turns.tolist(), strict=True))
        ]
        head = {"name": self.name, "bytes": self.size, "sha256": self.sha256, "extensions": self.extensions}
        return {**head, "samples": samples}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Shard:
        """Reads what `to_dict` wrote."""
        samples = data["samples"]
        flat = np.array([number for sample in samples for number in sample[2]], dtype=np.int64)
        return cls(
            name=check_name(data["name"]),
            size=int(data["bytes"]),
            sha256=str(data["sha256"]),
            keys=[str(sample[0]) for sample in samples],
            turns=np.array([sample[1] for sample in samples], dtype=np.int32),
            starts=np.cumsum([0] + [len(sample[2]) // 3 for sample in samples], dtype=np.int64),
            members=flat.reshape(-1, 3),
            extensions=[str(extension) for extension in data["extensions"]],
        )


def check_name(name: str) -> str:
    """Refuses names that lead out of their folder.

    Raises:
        UserError: If the name is empty, absolute, or has a part `..`.
    """
    if not name or name.startswith(("/", "~")) or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UserError(f"Expected a plain relative name, got {name!r}. Absolute names and `..` are refused.")
    return name


def split_member(name: str, origin: str) -> tuple[str, str]:
    """Splits a member's name into key and extension.

    Raises:
        UserError: If the name is absolute, leads outside, or is not KEY.json or an image of a known kind.
    """
    match = MEMBER_NAME.fullmatch(check_name(name))
    if match is None or match[2].rpartition(".")[2] not in (*IMAGE_FORMATS, "json") or match[2].endswith(".json"):
        kinds = ", ".join(["json", *IMAGE_FORMATS])
        raise UserError(f"{origin}: expected members named KEY.EXTENSION with one of {kinds}, got {name!r}.")
    return match[1], match[2]


def image_order(member: Member) -> int:
    """Sorts KEY.0.png before KEY.1.png; use as the key of `sorted`."""
    number = member.extension.partition(".")[0]
    return int(number) if number.isdigit() else 0


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def walk_shard(path: Path) -> Iterator[tuple[str, list[Member], bytes]]:
    """Yields key, members and JSON content of each sample of a tar file, and checks its structure.

    Raises:
        UserError: If the file is no plain tar, is cut short, or a member is no valid part of a sample.
    """
    key, text = "", b""
    members: list[Member] = []
    for name, member, content in _walk_members(path):
        if name != key and members:
            yield key, members, text
            members, text = [], b""
        key = name
        members.append(member)
        text = content or text
    if members:
        yield key, members, text


def _walk_members(path: Path) -> Iterator[tuple[str, Member, bytes]]:
    """Yields key, place and, for JSON only, content of each member."""
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg():
                    raise UserError(f"{path}: member {info.name!r} is no regular file; links and devices are refused.")
                key, extension = split_member(info.name, str(path))
                stream = tar.extractfile(info) if extension == "json" else None
                yield key, Member(extension, info.offset_data, info.size), stream.read() if stream else b""
                end = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole plain tar file ({error}). Copy or build the shard again.") from error
    _check_end(path, end)


def _check_end(path: Path, end: int) -> None:
    """Python's reader stops without a word at a broken header; only the end marker proves that all was read."""
    with path.open("rb") as stream:
        stream.seek(end)
        tail = stream.read()
    if len(tail) < 2 * TAR_BLOCK or tail.strip(b"\0"):
        raise UserError(
            f"{path}: expected the end of the tar after byte {end}, got {len(tail)} bytes that are no end marker. "
            "The shard is cut short or damaged; copy or build it again."
        )


def index_shard(path: Path) -> Shard:
    """Reads one tar file and returns its part of the index.

    Raises:
        UserError: If the shard is damaged, a key stands twice, or a sample has no valid JSON.
    """
    keys: list[str] = []
    turns: list[int] = []
    counts: list[int] = [0]
    rows: list[tuple[int, int, int]] = []
    extensions: dict[str, int] = {}
    seen: set[str] = set()
    for key, members, text in walk_shard(path):
        if key in seen or len({member.extension for member in members}) != len(members):
            raise UserError(f"{path}: key {key!r} stands twice. Give each sample a key of its own.")
        if not text:
            raise UserError(f"{path}: expected {key}.json beside the images of {key!r}, found none.")
        seen.add(key)
        keys.append(key)
        turns.append(len(parse_json(text, f"{path}: {key}")) // 2)
        counts.append(len(members))
        rows += [(extensions.setdefault(m.extension, len(extensions)), m.offset, m.size) for m in members]
    return Shard(
        name=path.name,
        size=path.stat().st_size,
        sha256=file_sha256(path),
        keys=keys,
        turns=np.array(turns, dtype=np.int32),
        starts=np.cumsum(counts, dtype=np.int64),
        members=np.array(rows, dtype=np.int64).reshape(-1, 3),
        extensions=list(extensions),
    )


def parse_json(data: bytes, origin: str) -> list[dict[str, str]]:
    """Decodes KEY.json and returns its `conversations`.

    Raises:
        UserError: If the bytes are no strict UTF-8, no JSON, or hold no list of conversations.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{origin}: expected UTF-8 JSON with `conversations`, got bytes that fail: {error}.") from error
    conversations = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(conversations, list):
        raise UserError(f"{origin}: expected a JSON object with a list `conversations`, got {type(content).__name__}.")
    return conversations


def build_index(folder: Path) -> list[Shard]:
    """Indexes every `*.tar` of a folder and writes `index.json` beside them.

    Raises:
        UserError: If there is no shard, or a key stands in two shards.
    """
    shards = [index_shard(path) for path in sorted(folder.glob("*.tar"))]
    if not any(len(shard) for shard in shards):
        raise UserError(f"Expected samples in {folder / '*.tar'}, found {len(shards)} shard(s) with none.")
    owner: dict[str, str] = {}
    for shard in shards:
        for key in shard.keys:
            if owner.setdefault(key, shard.name) != shard.name:
                raise UserError(f"{folder}: key {key!r} stands in {owner[key]} and {shard.name}; keys must differ.")
    data = {"schema": INDEX_SCHEMA, "shards": [shard.to_dict() for shard in shards]}
    partial = folder / (INDEX_FILE + ".part")
    partial.write_text(json.dumps(data, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / INDEX_FILE)
    return shards


def load_index(folder: Path) -> list[Shard]:
    """Reads `index.json` of a folder.

    Raises:
        UserError: If folder or index is missing, is of another schema, or is damaged.
    """
    path = folder / INDEX_FILE
    hint = "Write shards with `python -m moextend_pl shards build`."
    if not path.is_file():
        state = "a folder without it" if folder.is_dir() else "no such folder"
        raise UserError(f"Expected shards with {INDEX_FILE} in {folder}, found {state} (cwd {Path.cwd()}). {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data.get("schema")
        if schema == INDEX_SCHEMA:
            shards = [Shard.from_dict(shard) for shard in data["shards"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: not a readable index ({type(error).__name__}: {error}). {hint}") from error
    if schema != INDEX_SCHEMA:
        raise UserError(f"{path}: expected `schema: {INDEX_SCHEMA}`, got {schema!r}. {hint}")
    if not any(len(shard) for shard in shards):
        raise UserError(f"{path}: expected at least one sample, the index lists none. {hint}")
    return shards
