"""Questions about pictures from the data that a run learned from or was measured on, where they lie on this machine."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from moextend_pl.contracts import UserError
from moextend_pl.inference.pictures import MAX_BYTES
from moextend_pl.runs.plain_yaml import read_yaml
from moextend_pl.samples.pixels import open_image
from moextend_pl.samples.turns import IMAGE_FORMATS, IMAGE_MARK, SOUND_MARK

CONFIG = "config.yaml"
SPLITS = ("test", "val", "train")
"""Of a stage's data; what was not learned comes first."""

MOST_MEMBERS = 400
"""Of a shard, that are looked at."""


@dataclass(frozen=True)
class DataSample:
    """A question about one picture.

    Attributes:
        question: Without the image mark.
        picture: Bytes of the file.
        name: Of the file.
    """

    question: str
    picture: bytes
    name: str


def run_samples(run: Path, count: int) -> list[DataSample]:
    """Returns some samples with pictures that differ; none where the run does not say its data, or they are not here.

    Args:
        run: Run directory.
        count: At most.
    """
    found: dict[bytes, DataSample] = {}
    for folder in _folders(run):
        for shard in sorted(folder.glob("*.tar"))[:1]:
            for sample in _samples(shard):
                found.setdefault(sample.picture, sample)
                if len(found) == count:
                    return list(found.values())
    return list(found.values())


def _folders(run: Path) -> Iterator[Path]:
    """Yields the folders of shards that a run names: as it says, from here, or from a folder around it."""
    try:
        config = read_yaml((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    for name in ("data", "init_args"):
        config = config.get(name) if isinstance(config, Mapping) else None
    for split in SPLITS:
        named = config.get(split) if isinstance(config, Mapping) else None
        for place in named.values() if isinstance(named, Mapping) else [named]:
            if isinstance(place, str):
                around = (Path(), *run.resolve().parents)
                yield from [parent / place for parent in around if (parent / place).is_dir()][:1]


def _samples(shard: Path) -> Iterator[DataSample]:
    """Yields the samples of a shard that are about one picture; what is damaged ends it."""
    members: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in islice(archive, MOST_MEMBERS):
                stream = archive.extractfile(member) if member.isfile() and member.size <= MAX_BYTES else None
                if stream is None:
                    continue
                key, _, ending = Path(member.name).name.partition(".")
                members.setdefault(key, {})[ending.lower()] = stream.read()
    except (OSError, tarfile.TarError):
        pass
    for key, files in members.items():
        pictures = [ending for ending in files if ending in IMAGE_FORMATS]
        question = _question(files.get("json", b""))
        if len(pictures) == 1 and question:
            name = f"{key}.{pictures[0]}"
            try:
                open_image(files[pictures[0]], name)
            except UserError:
                continue
            yield DataSample(question, files[pictures[0]], name)


def _question(data: bytes) -> str:
    """Returns the first question of a sample without its image mark; '' where there is none."""
    try:
        body: Any = json.loads(data)
        asked = body["conversations"][0]["value"]
    except (ValueError, LookupError, TypeError):
        return ""
    heard = not isinstance(asked, str) or SOUND_MARK in asked
    return "" if heard else asked.replace(IMAGE_MARK, "").strip()
