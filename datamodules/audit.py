"""Everything that can be wrong with a folder of shards, in one report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.cache import Source
from datamodules.index import Shard, file_sha256, load_index
from datamodules.pool import in_processes
from datamodules.reader import RawSample, ShardReader
from datamodules.scan import index_shard
from datamodules.streaming import ShardError
from moextend_pl.contracts import IGNORE_INDEX, SampleSpec, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import decode_image, open_image
from moextend_pl.samples.sound.waveform import read_sound, sound_suffix
from moextend_pl.samples.templates import load_tokenizer

AUDIT_RATE = 16_000
"""Samples a second that sounds are heard at, as nearly every encoder asks."""

BAR = 40
"""Signs of the longest bar of a histogram."""


@dataclass(frozen=True)
class AuditOptions:
    """How thorough an audit is.

    Attributes:
        workers: Processes.
        tokenizer: Folder of a tokenizer with a chat template; lengths are counted in characters if None.
        tokens_per_image: Placeholders that an image, or a sound, expands to.
        max_length: Cut as training would; None for no limit.
    """

    workers: int = 1
    tokenizer: str | None = None
    tokens_per_image: int = 16
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"Expected `workers` of at least 1, got {self.workers}.")


@dataclass
class Audit:
    """What was found, in one shard or in all.

    Attributes:
        problems: A sentence for each thing that is wrong.
        sound_shards: Shards that are as they were indexed.
        sound_samples: Samples that can be read, decoded and, with a tokenizer, learned from.
        formats: How many images are of which format.
        images_per_sample: How many samples have so many images.
        sides: Smallest and largest side of an image in pixels; empty without images.
        lengths: Length of each sample, in tokens or characters.
        supervised: Tokens that are learned.
    """

    problems: list[str] = field(default_factory=list)
    sound_shards: int = 0
    sound_samples: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    images_per_sample: Counter[int] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0

    def add(self, other: Audit) -> None:
        """Adds up two parts."""
        for name in ("problems", "sound_shards", "sound_samples", "lengths", "supervised"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.formats.update(other.formats)
        self.images_per_sample.update(other.images_per_sample)
        sides = self.sides + other.sides
        self.sides = [min(sides), max(sides)] if sides else []


@dataclass(frozen=True)
class Report:
    """An audit with the totals of the index.

    Attributes:
        place: Folder or address.
        shards: The index.
        found: What was found in all of them.
        options: How it was found.
    """

    place: str
    shards: list[Shard]
    found: Audit
    options: AuditOptions

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        found, lengths = self.found, np.array(self.found.lengths or [0])
        tokens = self.options.tokenizer is not None
        return {
            "place": self.place,
            **contents(self.shards),
            "sound_shards": found.sound_shards,
            "sound_samples": found.sound_samples,
            "formats": dict(sorted(found.formats.items())),
            "sides": found.sides,
            "images_per_sample": {str(count): number for count, number in sorted(found.images_per_sample.items())},
            "length_unit": "tokens" if tokens else "characters",
            "length": {f"p{part}": int(np.percentile(lengths, part)) for part in (0, 50, 95, 100)},
            "length_histogram": histogram(found.lengths),
            "supervised_ratio": found.supervised / max(sum(found.lengths), 1) if tokens else None,
            "problems": found.problems,
        }

    def lines(self) -> list[str]:
        """Returns the report for people."""
        data = self.to_dict()
        sides = f"; sides of {data['sides'][0]} to {data['sides'][1]} pixels" if data["sides"] else ""
        kinds = ", ".join(f"{kind} {number}" for kind, number in data["formats"].items()) or "none"
        counts = ", ".join(f"{number} with {count}" for count, number in data["images_per_sample"].items())
        length = data["length"]
        out = [
            *data["problems"],
            totals(self.place, self.shards),
            f"as indexed   {data['sound_shards']} of {data['shards']} shards",
            f"sound        {data['sound_samples']} of {data['samples']} samples",
            f"images       {kinds}{sides}; samples: {counts or 'none was read'}",
            f"{data['length_unit']:<12} least {length['p0']}, median {length['p50']}, 95 % below {length['p95']}, "
            f"most {length['p100']}",
        ]
        most = max(data["length_histogram"].values(), default=1)
        for span, number in data["length_histogram"].items():
            out.append(f"  {span:>15} {'#' * max(round(BAR * number / most), 1):<{BAR}} {number}")
        if data["supervised_ratio"] is not None:
            out.append(f"supervised   {100 * data['supervised_ratio']:.1f} % of the tokens")
        return [*out, f"{len(data['problems'])} problem(s)" if data["problems"] else "ok"]


def contents(shards: list[Shard]) -> dict[str, int]:
    """Returns how much a shard set holds."""
    return {
        "shards": len(shards),
        "samples": sum(map(len, shards)),
        "images": sum(shard.images for shard in shards),
        "turns": sum(int(shard.turns.sum()) for shard in shards),
        "bytes": sum(shard.size for shard in shards),
    }


def totals(place: str | Path, shards: list[Shard]) -> str:
    """Returns one line with all that a shard set holds."""
    *words, (_, size) = contents(shards).items()
    return f"{place}: {', '.join(f'{count} {word}' for word, count in words)}, {size / 2**20:.1f} MiB"


def histogram(lengths: list[int]) -> dict[str, int]:
    """Counts lengths between powers of two."""
    bins = Counter(length.bit_length() for length in lengths)
    return {f"{1 << bits >> 1}-{(1 << bits) - 1}": bins[bits] for bits in sorted(bins)}


def audit(place: str | Path, options: AuditOptions, progress: Callable[[int, int], None] | None = None) -> Report:
    """Reads, decodes and, with a tokenizer, encodes every sample; tells `progress` how many of how many are done.

    Raises:
        UserError: If there is no valid index, or the tokenizer cannot be used.
    """
    source = Source(place)
    shards = load_index(source)
    if options.tokenizer is not None:
        _encoder(options)
    found = Audit(problems=_strangers(source, shards) + _repeated(shards))
    jobs = [_Job(str(source), shard.alone(), options) for shard in shards]
    parts: dict[int, Audit] = {}
    samples = 0
    for number, part in in_processes(_audit_shard, jobs, options.workers):
        parts[number] = part
        samples += len(shards[number])
        if progress is not None:
            progress(samples, sum(map(len, shards)))
    for number in sorted(parts):
        found.add(parts[number])
    return Report(str(source), shards, found, options)


def load_spec(tokenizer: str | Path, tokens_per_image: int) -> SampleSpec:
    """Returns what a model with this tokenizer would ask of its data.

    Raises:
        UserError: If there is no such folder, or it holds no tokenizer.
    """
    loaded = load_tokenizer(tokenizer)
    return SampleSpec(loaded, len(loaded), tokens_per_image, image_size=32, tokens_per_sound=tokens_per_image)


@dataclass(frozen=True)
class _Job:
    place: str
    shard: Shard
    options: AuditOptions


@lru_cache(maxsize=1)
def _encoder(options: AuditOptions) -> ConversationEncoder:
    """One a process, since loading a tokenizer takes longer than auditing a small shard."""
    return ConversationEncoder(load_spec(str(options.tokenizer), options.tokens_per_image), options.max_length)


def _strangers(source: Source, shards: list[Shard]) -> list[str]:
    known = {shard.name for shard in shards}
    paths = [] if source.remote or source.names else sorted(Path(str(source)).glob("*.tar"))
    return [f"{path.name}: not in the index" for path in paths if path.name not in known]


def _repeated(shards: list[Shard]) -> list[str]:
    counts = Counter(key for shard in shards for key in shard.keys)
    return [f"key {key!r} stands {count} times" for key, count in counts.items() if count > 1]


def _audit_shard(job: _Job) -> Audit:
    part = Audit()
    source, shard = Source(job.place), job.shard
    try:
        if not source.remote:
            part.problems += [
                f"{shard.name}: {problem}" for problem in _file_problems(Path(source.name(shard.name)), shard)
            ]
        part.sound_shards = int(not part.problems)
        reader = ShardReader(job.place, shards=[shard])
        for number in range(len(reader)):
            _audit_sample(reader, number, job.options, part)
        reader.close()
    except ShardError as error:
        part.sound_shards = 0
        part.problems = part.problems or [str(error)]
    return part


def _file_problems(path: Path, shard: Shard) -> list[str]:
    """Compares a shard with its part of the index."""
    if not path.is_file():
        return ["missing"]
    size = path.stat().st_size
    if size != shard.size:
        return [f"the index says {shard.size} bytes, the file has {size}"]
    problems = []
    if file_sha256(path) != shard.sha256:
        problems.append("the content differs from what was indexed (sha256)")
    try:
        found = index_shard(path, faults=[])
    except UserError as error:
        return [*problems, str(error)]
    if not problems and shard.differs(found):
        problems.append("the index lists other samples than the file holds")
    return problems


def _audit_sample(reader: ShardReader, number: int, options: AuditOptions, part: Audit) -> None:
    """Adds one sample to what was found; its first fault ends it."""
    try:
        raw = reader.read(number)
        for data in raw.images:
            image = open_image(data, raw.origin)
            decode_image(data, raw.origin)
            part.formats[str(image.format)] += 1
            sides = [*part.sides, *image.size]
            part.sides = [min(sides), max(sides)]
        for data in raw.sounds:
            read_sound(data, raw.origin, AUDIT_RATE, math.inf)
            part.formats[sound_suffix(data, raw.origin).upper()] += 1
        part.images_per_sample[len(raw.images)] += 1
        _measure(raw, options, part)
    except ShardError:
        raise
    except UserError as error:
        shard, key = reader.describe(number)
        name = shard.rpartition("/")[2]
        part.problems.append(f"{name}: {key}: {str(error).removeprefix(f'{shard}: {key}: ')}")
    else:
        part.sound_samples += 1


def _measure(raw: RawSample, options: AuditOptions, part: Audit) -> None:
    if options.tokenizer is None:
        part.lengths.append(sum(len(turn.human) + len(turn.gpt) for turn in raw.turns))
        return
    sample = _encoder(options).encode(raw.key, raw.turns, [], [])
    part.lengths.append(len(sample.input_ids))
    part.supervised += int((sample.labels != IGNORE_INDEX).sum())
