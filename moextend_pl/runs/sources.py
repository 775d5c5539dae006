"""What a result was made from, by content: files beside the weights, plan, optimizer, and settings of the trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.runs.fingerprints import file_sha256

Sources = dict[str, dict[str, Any]]
"""Facts by section (`files`, `plan`, `optim`, `trainer`) and name."""

DECIDE_WEIGHTS = ("files", "plan", "optim", "trainer")
DECIDE_ANSWERS = ("files", "plan")
# Under which of its attributes a part of a model names a folder -> which files there decide what it computes.
TOWER_FILES = ("config.json", "preprocessor_config.json", "encoder.json")
FILES = {
    "base": ("config.json",),
    "path": TOWER_FILES,
    "folder": TOWER_FILES,
    "tokenizer_path": (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
    ),
}
# Told value by value; other files by their SHA-256.
READ = ("config.json", "preprocessor_config.json", "encoder.json", "tokenizer_config.json")
# What libraries write down of themselves, or what a run sets by itself.
NO_MATTER = (
    *("transformers_version", "_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("is_local", "local_files_only", "backend"),
)
# The trainer's settings that make the result; a step may be shared by any number of devices.
TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")
MISSING = "(not set)"
_SHOWN = 6
_SHOWN_LENGTH = 80


def file_facts(part: object, name: str) -> dict[str, Any]:
    """Returns the content of the files that decide what a part of a model computes.

    Args:
        part: Names its folders as `FILES` lists them.
        name: Of the part; empty for a model by itself.

    Returns:
        Plain values by file and key, or the SHA-256 of a file.
    """
    facts: dict[str, Any] = {}
    for attribute, files in FILES.items():
        folder = getattr(part, attribute, None)
        for file in files if isinstance(folder, str | Path) else ():
            path = Path(str(folder)) / file
            place = f"{name}/{file}" if name else file
            if path.is_file():
                facts.update(_values(path, place) if file in READ else {place: file_sha256(path)[:16]})
    return facts


def _values(path: Path, place: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {place: file_sha256(path)[:16]}
    return {f"{place}: {key}": value for key, value in flatten(found).items() if key not in NO_MATTER}


def plain(data: Any) -> Any:
    """Returns data as JSON would give it back, so that what was saved compares with what is."""
    return json.loads(json.dumps(data, default=str))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dots between the keys; `init_args` of a class counts as the class."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
        flat.update(flatten(item, name))
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for each fact that differs."""
    return [
        f"{key} was {_shorten(before.get(key, MISSING))}, now {_shorten(now.get(key, MISSING))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, MISSING) != now.get(key, MISSING)
    ]


def refuse_other_sources(earlier: Sources, now: Sources, sections: Iterable[str], place: str, advice: str) -> None:
    """Refuses to go on with what was made from something else.

    Args:
        earlier: What it was made from; sections that are not there are not compared.
        now: What would go on with it.
        sections: Which to compare.
        place: What was made.
        advice: What to do.

    Raises:
        UserError: If they differ; names the facts with both values.
    """
    found = [
        phrase
        for section in sections
        if section in earlier
        for phrase in differences(flatten(earlier[section], section), flatten(now[section], section))
    ]
    if found:
        raise UserError(f"{place} was made from something else: {told(found)}. {advice}")


def told(phrases: list[str]) -> str:
    """Returns the first of some phrases, and how many more there are."""
    more = f"; and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
    return "; ".join(phrases[:_SHOWN]) + more


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."
