"""The index beside the shards: where each sample lies, so that any sample can be read at once.

`index.json` holds a schema number, facts of each shard (name, bytes, sha256, counts, extensions), and size and
digest of `index.safetensors`. That file holds arrays over all samples of all shards in a row, n samples with
m members: `turns` (n,), `starts` (n + 1,) into the rows of `members` (m, 3: extension as a position in the
shard's list, offset, size), and the keys as bytes with their `key_ends` (n + 1,). `checksums` (n,), the crc32 of
the contents of each sample's members in a row, is there unless an older version wrote the index. It is mapped into
memory, so that a million samples open at once, and processes share the pages.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from datamodules.cache import DIGEST, Source
from datamodules.keys import Keys
from datamodules.members import Member, check_name
from datamodules.streaming import ShardError
from moextend_pl.contracts import UserError

INDEX_SCHEMA = 2
INDEX_FILE, ARRAYS_FILE = "index.json", "index.safetensors"
MAX_INDEX_BYTES = 256 * 2**20
"""Largest `index.json`: a few hundred bytes a shard."""

HINT = "Write shards with `python -m moextend_pl shards build`, or index those of others with `shards index`."
KINDS: dict[type, str] = {np.int32: "I32", np.int64: "I64", np.uint8: "U8", np.uint32: "U32"}
DTYPES: dict[str, type] = {
    "turns": np.int32,
    "starts": np.int64,
    "members": np.int64,
    "keys": np.uint8,
    "key_ends": np.int64,
    "checksums": np.uint32,
}
CHECKSUMS = "checksums"


@dataclass
class Shard:
    """One tar file; samples are kept in arrays, since there may be millions.

    Attributes:
        name: File name inside its folder.
        size: Bytes of the file.
        sha256: Digest of the file.
        keys: n names.
        turns: (n,) turns of each sample.
        starts: (n + 1,) sample i owns rows `starts[i] - starts[0]` to `starts[i + 1] - starts[0]` of `members`.
        members: (m, 3) extension, offset and size.
        extensions: Names of the extensions that `members` refers to.
        images: Images of all samples.
        checksums: (n,) crc32 of each sample; None if an older version wrote the index.
    """

    name: str
    size: int
    sha256: str
    keys: Keys
    turns: np.ndarray
    starts: np.ndarray
    members: np.ndarray
    extensions: list[str]
    images: int
    checksums: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, position: int) -> list[Member]:
        """Returns the members of one sample, in the order in which they lie in the shard."""
        first, last = (self.starts[position : position + 2] - self.starts[0]).tolist()
        return [Member(self.extensions[kind], offset, size) for kind, offset, size in self.members[first:last].tolist()]

    def alone(self) -> Shard:
        """Returns the shard without a hold on the arrays of the others, to be sent to another process."""
        keys, starts = Keys.of(list(self.keys)), self.starts - self.starts[0]
        sums = None if self.checksums is None else self.checksums.copy()
        return replace(
            self, keys=keys, turns=self.turns.copy(), starts=starts, members=self.members.copy(), checksums=sums
        )

    def differs(self, other: Shard) -> bool:
        """Tells whether two descriptions of a shard are not the same."""
        facts = ("name", "size", "sha256", "extensions", "images")
        return any(getattr(self, fact) != getattr(other, fact) for fact in facts) or not (
            list(self.keys) == list(other.keys)
            and np.array_equal(self.turns, other.turns)
            and np.array_equal(self.starts - self.starts[0], other.starts - other.starts[0])
            and np.array_equal(self.members, other.members)
            and (self.checksums is None or other.checksums is None or np.array_equal(self.checksums, other.checksums))
        )


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes the index of a folder; the old one holds until the new one is whole."""
    members = np.concatenate([shard.members for shard in shards])
    counts = np.concatenate([np.diff(shard.starts) for shard in shards])
    key_sizes = np.concatenate([np.diff(shard.keys.ends) for shard in shards])
    arrays = {
        "turns": np.concatenate([shard.turns for shard in shards]),
        "starts": np.concatenate([[0], np.cumsum(counts)]),
        "members": members,
        "keys": np.concatenate([shard.keys.data[shard.keys.ends[0] : shard.keys.ends[-1]] for shard in shards]),
        "key_ends": np.concatenate([[0], np.cumsum(key_sizes)]),
    }
    sums = [shard.checksums for shard in shards if shard.checksums is not None]
    if len(sums) == len(shards):
        arrays[CHECKSUMS] = np.concatenate(sums)
    partial = folder / f".{ARRAYS_FILE}.part"
    # Not `save_file`, whose files only their owner may read.
    partial.write_bytes(save({n: np.ascontiguousarray(array, dtype=DTYPES[n]) for n, array in arrays.items()}))
    facts = [
        {
            "name": shard.name,
            "bytes": shard.size,
            "sha256": shard.sha256,
            "samples": len(shard),
            "images": shard.images,
            "turns": int(shard.turns.sum()),
            "extensions": shard.extensions,
        }
        for shard in shards
    ]
    beside = {"bytes": partial.stat().st_size, "sha256": file_sha256(partial)}
    text = json.dumps({"schema": INDEX_SCHEMA, "arrays": beside, "shards": facts}, indent=1, ensure_ascii=False)
    written = folder / f".{INDEX_FILE}.part"
    written.write_text(text + "\n", encoding="utf-8")
    # A process killed between the two leaves a digest that does not fit, which is told with the way to mend it.
    partial.replace(folder / ARRAYS_FILE)
    written.replace(folder / INDEX_FILE)


def load_index(place: str | Path | Source) -> list[Shard]:
    """Reads the index of a folder.

    Args:
        place: Folder, or address of a remote one.

    Raises:
        UserError: If folder or index is missing, is of another schema, or is damaged.
    """
    source = place if isinstance(place, Source) else Source(place)
    name = source.name(INDEX_FILE)
    try:
        data = json.loads(source.read_small(INDEX_FILE, MAX_INDEX_BYTES).decode("utf-8"))
        schema = data.get("schema")
        if schema == INDEX_SCHEMA:
            shards = _split(data["shards"], _arrays(source, data["arrays"]))
    except OSError:
        raise UserError(_absent(source)) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{name}: not a readable index ({type(error).__name__}: {error}). {HINT}") from error
    if schema != INDEX_SCHEMA:
        raise UserError(
            f"{name}: expected `schema: {INDEX_SCHEMA}`, got {schema!r}. Shards written for another version stay as "
            "they are; run `python -m moextend_pl shards index` on their folder."
        )
    shards = _named(source, shards)
    if not any(len(shard) for shard in shards):
        raise UserError(f"{name}: expected at least one sample, the index lists none. {HINT}")
    return shards


def _named(source: Source, shards: list[Shard]) -> list[Shard]:
    """Returns the shards that a pattern names, all if it names none."""
    if source.names is None:
        return shards
    known = {shard.name: shard for shard in shards}
    missing = [name for name in source.names if name not in known]
    if missing:
        some = ", ".join(missing[:3])
        raise UserError(
            f"{source}: expected {len(source.names)} shards, the index of {source.place} lacks {some}. {HINT}"
        )
    return [known[name] for name in dict.fromkeys(source.names)]


def _absent(source: Source) -> str:
    there = Path(source.place).is_dir()
    state = "a folder without it" if there else "no such folder"
    pattern = any(sign in source.place for sign in "*?[{") and not there
    advice = " Patterns are not expanded, but for names of shards in braces, `{000..099}.tar`." if pattern else ""
    return f"Expected shards with {INDEX_FILE} in {source}, found {state} (cwd {Path.cwd()}).{advice} {HINT}"


def _arrays(source: Source, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Maps the arrays into memory, after their digest was compared."""
    name, digest = source.name(ARRAYS_FILE), _digest(facts["sha256"])
    handle = source.open(ARRAYS_FILE, int(facts["bytes"]), digest)
    with os.fdopen(handle, "rb") as stream:
        if not source.remote and hashlib.file_digest(stream, "sha256").hexdigest() != digest:
            raise ShardError(f"{name}: not the file that {INDEX_FILE} was written with. Run `shards index` again.")
        return _of_kind(_mapped(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))


def _mapped(data: mmap.mmap) -> dict[str, np.ndarray]:
    """Returns views of the arrays; safetensors' own reader would copy them, or need torch.

    Format: https://huggingface.co/docs/safetensors/index#format. Whatever does not fit it raises ValueError.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start].decode("utf-8"))
    arrays: dict[str, np.ndarray] = {}
    for name, kind in DTYPES.items():
        if name == CHECKSUMS and name not in header:
            continue
        shape = [int(length) for length in header[name]["shape"]]
        if header[name]["dtype"] != KINDS[kind] or min(shape, default=0) < 0:
            raise ValueError(f"{ARRAYS_FILE}: {name} is {header[name]['dtype']} of shape {shape}")
        offset = start + int(header[name]["data_offsets"][0])
        arrays[name] = np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape)
    return arrays


def _digest(text: Any) -> str:
    if not isinstance(text, str) or not DIGEST.fullmatch(text):
        raise ValueError(f"expected a sha256 of 64 digits, got {text!r}")
    return text


def _split(facts: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[Shard]:
    """Cuts the arrays into shards; whatever does not fit together raises ValueError."""
    shards = []
    first = row = 0
    for fact in facts:
        last = first + int(fact["samples"])
        if not first <= last <= len(arrays["turns"]):
            raise ValueError(f"{fact['name']}: more samples than the arrays hold")
        end = int(arrays["starts"][last])
        members, extensions = arrays["members"][row:end], [str(extension) for extension in fact["extensions"]]
        if len(members) and not members[:, 0].max() < len(extensions):
            raise ValueError(f"{fact['name']}: an unknown extension")
        shards.append(
            Shard(
                name=check_name(fact["name"]),
                size=int(fact["bytes"]),
                sha256=_digest(fact["sha256"]),
                keys=Keys(arrays["keys"], arrays["key_ends"][first : last + 1]),
                turns=arrays["turns"][first:last],
                starts=arrays["starts"][first : last + 1],
                members=members,
                extensions=extensions,
                images=int(fact["images"]),
                checksums=arrays[CHECKSUMS][first:last] if CHECKSUMS in arrays else None,
            )
        )
        first, row = last, end
    if first != len(arrays["turns"]):
        raise ValueError("fewer samples than the arrays hold")
    return shards


def _of_kind(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays if they fit together, else raises ValueError."""
    samples = len(arrays["turns"])
    for name, array in arrays.items():
        if array.ndim != (2 if name == "members" else 1):
            raise ValueError(f"{ARRAYS_FILE}: {name} has the shape {array.shape}")
    for name, total in (("starts", len(arrays["members"])), ("key_ends", len(arrays["keys"]))):
        ends = arrays[name]
        if len(ends) != samples + 1 or ends[0] != 0 or ends[-1] != total or (np.diff(ends) < 1).any():
            raise ValueError(f"{ARRAYS_FILE}: {name} does not fit {samples} samples")
    if CHECKSUMS in arrays and len(arrays[CHECKSUMS]) != samples:
        raise ValueError(f"{ARRAYS_FILE}: {CHECKSUMS} does not fit {samples} samples")
    if arrays["members"].shape[1:] != (3,) or (arrays["members"] < 0).any() or (arrays["turns"] < 1).any():
        raise ValueError(f"{ARRAYS_FILE}: expected members (m, 3) and turns without negative numbers")
    return arrays
