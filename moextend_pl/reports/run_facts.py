"""What a run directory says about its stage, read from its files; what is not there, or damaged, is left out."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moextend_pl.contracts import PLAN_FILE
from moextend_pl.runs.atomic import read_json
from moextend_pl.runs.plain_yaml import read_yaml

METRICS, RECEIPT, CONFIG, USAGE_LOG = "metrics.csv", "stage.json", "config.yaml", "expert_usage.jsonl"
MOST_SAMPLES = 12
Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class RunFacts:
    """What one run left behind.

    Attributes:
        name: Of its directory.
        receipt: `stage.json`; empty where the stage has not ended.
        config: `config.yaml`.
        curves: Steps and values of everything that was logged, by name.
        usage: Counts of expert choice at some steps, first ones first.
        plan: The extension plan with its report; empty where there is none.
        frozen: What the guard of frozen tensors found.
        manifest: Of the delta.
        answers: Some answers by test set, wrong ones among them as often as in the whole set, and how many of all
            were right.
        scores: Scores of `evaluate` by task.
        retention: What `evaluate --retention` measured, by text.
        pictures: PNGs that the run drew, by name.
    """

    name: str
    receipt: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, Curve]
    usage: list[dict[str, Any]]
    plan: dict[str, Any]
    frozen: dict[str, Any]
    manifest: dict[str, Any]
    answers: dict[str, tuple[list[dict[str, Any]], int, int]]
    scores: dict[str, dict[str, Any]]
    retention: dict[str, Any]
    pictures: dict[str, bytes]


def find_runs(folder: Path) -> list[Path]:
    """Returns the folder if it is a run, else the runs in it, by name."""

    def is_run(path: Path) -> bool:
        return any((path / name).is_file() for name in (METRICS, RECEIPT))

    if is_run(folder) or not folder.is_dir():
        return [folder] if is_run(folder) else []
    return [path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file() and is_run(path)]


def read_run(run: Path) -> RunFacts:
    """Reads all that a page tells about a run."""
    return RunFacts(
        name=run.resolve().name,
        receipt=read_json(run / RECEIPT),
        config=_yaml(run / CONFIG),
        curves=read_curves(run / METRICS),
        usage=list({row["step"]: row for row in _rows(run / USAGE_LOG) if "step" in row}.values()),
        plan=_yaml(run / PLAN_FILE),
        frozen=read_json(run / "frozen.json"),
        manifest=read_json(run / "manifest.json"),
        answers={
            path.stem.removeprefix("predictions_"): _some(path) for path in sorted(run.glob("predictions_*.jsonl"))
        },
        scores={
            f"{path.parent.name} ({path.stem.removeprefix('scores_')})": read_json(path)
            for path in sorted(run.glob("evaluation/*/scores_*.json"))
        },
        retention=read_json(run / "evaluation" / "retention.json"),
        pictures={path.stem: path.read_bytes() for path in sorted(run.glob("plots/*.png"))},
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """Reads `metrics.csv`; a continued run took some steps twice, and the last row of a step counts."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    step = int(row.get("step") or "")
                    values = {n: float(v) for n, v in row.items() if n and n not in ("step", "epoch") and v}
                except (TypeError, ValueError):
                    continue  # cut off by a kill
                for name, value in values.items():
                    found[name][step] = value
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in found.items()}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of JSON Lines; one that a kill cut off is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _some(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Returns answers spread evenly over right ones and wrong ones, how many are right, and how many there are."""
    rows = list(_rows(path))
    right = [row for row in rows if row.get("correct")]
    wrong = [row for row in rows if not row.get("correct")]
    count = min(len(wrong), max(round(MOST_SAMPLES * len(wrong) / max(len(rows), 1)), bool(wrong)))
    return _spread(right, MOST_SAMPLES - count) + _spread(wrong, count), len(right), len(rows)


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return rows[:: max(len(rows) // count, 1)][:count] if count else []
