"""Own data for the stages: shards to learn from and to measure on, and the questions of the latter as a test set."""

from __future__ import annotations

import argparse
import hashlib
import logging
from pathlib import Path

from moextend_pl.cli.commands import run
from moextend_pl.runs.atomic import read_json, write_json

log = logging.getLogger(__name__)

INDEX, SOURCE = "index.json", "source.json"
TEST_SET, QUESTIONS = "own", "questions.jsonl"
"""Folder and file of questions, as `evaluate --tasks own` reads them."""


def make_shards(options: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the shards to learn from and those to measure on; makes them of data that are none.

    Args:
        options: Of the command.
    """
    place = options.out / "data"
    own = [given for given in (options.val, options.data) if given is not None and not _are_shards(given)]
    train = place / "train" if options.data in own else options.data
    if options.val is None and options.data not in own:
        log.warning("no `--val`: the stages are measured on samples that they learned from")
        val = train
    else:
        val = place / "val" if options.val is None or options.val in own else options.val
    given = {train, val} - {place / "train", place / "val"}
    for folder in given:
        if not (folder / INDEX).is_file():
            run(["shards", "index", str(folder)])
    asked = {name: str(getattr(options, name)) for name in ("data", "images", "question", "columns", "val")}
    indexes = sorted(folder / INDEX for folder in given)  # questions are those of the shards as they are now
    asked["seen"] = state_of(*own, *([Path(options.images)] if options.images else []), *indexes)
    if read_json(place / SOURCE) == asked and all((folder / INDEX).is_file() for folder in (train, val)):
        log.info("the data are there already; delete %s to make them anew", place)
        return train, val
    if options.val in own:  # first, so that a mistake in it is told before much is done
        _build(options.val, val, options)
    if options.data in own:
        _build(options.data, train, options, *(["--val", str(val)] if options.val is None else []))
    run(["shards", "questions", str(val), "--out", str(place / TEST_SET)])
    write_json(place / SOURCE, asked)
    return train, val


def _build(place: Path, out: Path, options: argparse.Namespace, *more: str) -> None:
    arguments = ["shards", "build", "data", str(place), "--out", str(out), *more]
    for name in ("images", "question", "columns"):
        arguments += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    run(arguments)


def _are_shards(place: Path) -> bool:
    return (place / INDEX).is_file() or any(place.glob("*.tar"))


def state_of(*places: Path) -> str:
    """Returns a digest of names, sizes and times of files, by which data that were added to are told from the same."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                facts = path.stat()
                digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def count_samples(folder: Path) -> int:
    """Returns the number of samples of a folder of shards."""
    return sum(int(shard["samples"]) for shard in read_json(folder / INDEX)["shards"])
