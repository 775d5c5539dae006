"""JSON files of conversations and folders of images as shards, built by several processes and continued after a stop.

Which entry goes into which shard is settled before any process starts, so the bytes do not depend on how many
there are. A shard that is finished has its final name; a build that was stopped goes on behind the finished ones.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from datamodules.index import Shard
from datamodules.llava_entries import Shrink, entry_name, is_unnamed, make_entry, read_annotations, unique_keys
from datamodules.own_data import OwnData
from datamodules.pool import in_processes
from datamodules.scan import build_index
from datamodules.shards import (
    SAMPLES_PER_SHARD,
    SKIPPED_FILE,
    Entry,
    check_free,
    is_shard_folder,
    take_place,
    write_shard,
)
from moextend_pl.contracts import UserError

MAX_PROBLEMS = 20
FACTS_FILE, LOCK_FILE, DONE = "build.json", "build.lock", ".done"
Progress = Callable[[int, int], None]
"""Is told how many samples of how many are done."""


@dataclass(frozen=True)
class BuildOptions:
    """How shards are built.

    Attributes:
        samples_per_shard: Entries of each shard but the last.
        workers: Processes.
        resize: Shorter side in pixels that larger images are shrunk to; None keeps the files as they are.
        square: Whether shrunk images are stretched to a square of that side, as a tower that squashes sees them.
        quality: JPEG quality of images that were shrunk.
        skip_bad: Whether to leave out entries with mistakes instead of writing nothing.
    """

    samples_per_shard: int = SAMPLES_PER_SHARD
    workers: int = 1
    resize: int | None = None
    square: bool = False
    quality: int = 90
    skip_bad: bool = False

    def __post_init__(self) -> None:
        ranges = {"samples_per_shard": (1, None), "workers": (1, None), "resize": (1, None), "quality": (1, 100)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                raise UserError(
                    f"Expected `{name}` of at least {low}{f', at most {high}' if high else ''}, got {value}."
                )


@dataclass
class Done:
    """What became of the entries of one shard, or of all.

    Attributes:
        problems: A sentence for each mistake of an entry.
        bytes_before: Bytes of the image files that were read.
        bytes_after: Bytes that they take in the shards.
        dropped: What was left out of entries by a rule of `dialects.py`, counted by what it was.
    """

    problems: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def add(self, other: Done) -> None:
        """Adds up two parts."""
        self.problems += other.problems
        self.bytes_before += other.bytes_before
        self.bytes_after += other.bytes_after
        self.drop(other.dropped)

    def drop(self, dropped: dict[str, int]) -> None:
        """Counts what was left out."""
        for what, count in dropped.items():
            self.dropped[what] = self.dropped.get(what, 0) + count


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        shards: What was written.
        renamed: How many entries got another key, since theirs was taken or held a dot.
        unnamed: How many entries have no id and are named by their place.
        done: Sizes, and the problems of entries that were left out.
    """

    shards: list[Shard]
    renamed: int
    unnamed: int
    done: Done


@dataclass(frozen=True)
class _Job:
    """One shard to build: its file and its entries, as (number in the JSON file, key, entry)."""

    path: Path
    items: Sequence[tuple[int, str, Any]]
    images: Path
    options: BuildOptions


def build_from_llava(
    annotations: Path,
    images: Path,
    out: Path,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> Built:
    """Builds shards from a JSON or JSON Lines file, see `build_shards`.

    Args:
        annotations: Entries `{"id"?, "image"?: name or names, "conversations"}`, or in another dialect.
        images: Folder that the image names start from.
        out: Folder of shards to write.
        options: How to build.
        progress: Is told how far it got.
    """
    if not images.is_dir():
        raise UserError(f"Expected a folder of images at {images}, found none (cwd {Path.cwd()}).")
    data, items = read_annotations(annotations)
    return build_shards(OwnData(annotations, hashlib.sha256(data).hexdigest(), items, images), out, options, progress)


def build_shards(
    data: OwnData, out: Path, options: BuildOptions | None = None, progress: Progress | None = None
) -> Built:
    """Builds shards from entries; the folder appears when all is written.

    Args:
        data: The entries.
        out: Folder of shards to write.
        options: How to build.
        progress: Is told how far it got.

    Raises:
        UserError: With all problems of all entries, if there is any and they are not to be skipped or leave nothing.
    """
    options = options or BuildOptions()
    out = out.absolute()
    check_free(out, is_shard_folder)
    if not data.images.is_dir():
        raise UserError(f"Expected a folder of images at {data.images}, found none (cwd {Path.cwd()}).")
    items, images = data.items, data.images
    keys, renamed = unique_keys(items)
    # The images themselves are not part of it: reading all of them again would cost as much as the build.
    facts = {"annotations": data.digest, "images": str(images.absolute()), **asdict(options)}
    del facts["workers"]
    with _workplace(out, facts) as folder:
        rows = [(number, key, item) for number, (key, item) in enumerate(zip(keys, items, strict=True))]
        step = options.samples_per_shard
        jobs = [
            _Job(folder / f"{start // step:05d}.tar", rows[start : start + step], images, options)
            for start in range(0, len(rows), step)
        ]
        finished: dict[int, Done] = {}
        for number, done in in_processes(_build_shard, jobs, options.workers):
            finished[number] = done
            if progress is not None:
                progress(min(len(finished) * step, len(rows)), len(rows))
        total = Done(dropped=dict(data.dropped))
        for number in sorted(finished):
            total.add(finished[number])
        if total.problems and not (options.skip_bad and any(folder.glob("*.tar"))):
            shutil.rmtree(folder)
            raise UserError(_summary(data.place, total.problems, options.skip_bad))
        return Built(_finish(folder, out, total), renamed, sum(map(is_unnamed, items)), total)


@contextmanager
def _workplace(out: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """Gives the folder in which a build happens; if the process is stopped, it stays for the next one."""
    folder = out.parent / f".{out.name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"Another process is building {out}. Wait for it, or choose another folder.") from None
    try:
        known, text = folder / FACTS_FILE, json.dumps(facts)
        if not known.is_file() or known.read_text(encoding="utf-8") != text:
            for path in folder.iterdir():
                if path.name != LOCK_FILE:
                    path.unlink()
            known.write_text(text, encoding="utf-8")
        yield folder
    finally:
        lock.release()


def _finish(folder: Path, out: Path, total: Done) -> list[Shard]:
    """Writes the index, clears the traces of building, and puts the folder in its place."""
    shards = build_index(folder)
    for path in folder.iterdir():
        if path.suffix == DONE or path.name in (FACTS_FILE, LOCK_FILE):
            path.unlink()
    if total.problems:
        lines = "".join(json.dumps({"problem": problem}, ensure_ascii=False) + "\n" for problem in total.problems)
        (folder / SKIPPED_FILE).write_text(lines, encoding="utf-8")
    take_place(folder, out)
    return shards


def _build_shard(job: _Job) -> Done:
    """Builds one shard, unless an earlier build has finished it."""
    marker = job.path.with_suffix(DONE)
    if marker.is_file():
        return Done(**json.loads(marker.read_text(encoding="utf-8")))
    done = Done()
    partial = job.path.with_suffix(".tmp")
    for left in (partial, job.path):  # by an earlier build that met problems or was killed
        left.unlink(missing_ok=True)
    if write_shard(partial, _entries(job, done)):
        partial.replace(job.path)
    if not done.problems:  # what is wrong may be mended until the next build
        written = marker.with_suffix(".tmp")
        written.write_text(json.dumps(asdict(done)), encoding="utf-8")
        written.replace(marker)
    return done


def _entries(job: _Job, done: Done) -> Iterator[Entry]:
    shrink = Shrink(job.options.resize, job.options.square, job.options.quality)
    for number, key, item in job.items:
        made = make_entry(item, key, job.images, shrink)
        done.problems += [f"entry {number} ({entry_name(item)}): {problem}" for problem in made.problems]
        done.bytes_before += made.bytes_before
        if made.entry is not None and (job.options.skip_bad or not done.problems):
            done.bytes_after += sum(map(len, made.entry.images))
            done.drop(made.dropped)
            yield made.entry


def _summary(path: Path, problems: list[str], skipped: bool) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:MAX_PROBLEMS])
    more = f"\n  ... and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    advice = "no entry is left without them" if skipped else "or leave them out with --skip-bad"
    return (
        f"{path}: expected valid entries, got {len(problems)} problem(s). Mend them and build again, {advice}."
        f"{shown}{more}"
    )
