"""From a study to its runs: which stage files, in which folders, after which other runs.

Runs of two variants that have the same overrides up to a stage share that stage: one run serves both.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ablation.studies import SEED, Overrides, Study, Variant
from moextend_pl.cli.config_files import expand_layers
from moextend_pl.contracts import UserError

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = Variant("default", "default", {})


@dataclass(frozen=True)
class Run:
    """One run of one stage.

    Attributes:
        name: Its folder below the study's, for example `seed0/3_extend/routing-open`.
        stage: Its stage.
        config: Its stage file as text; for the stage `data`, the arguments of `shards`.
        after: Names of the runs whose files it reads.
        measured: Whether it answers the test sets when it has learned.
        digest: Changes with its own settings and with those of every run before it.
    """

    name: str
    stage: str
    config: str
    after: tuple[str, ...]
    measured: bool
    digest: str


@dataclass(frozen=True)
class Plan:
    """All runs of a study in an order in which they can be run, and where each variant's result is.

    Attributes:
        runs: Name -> run.
        results: (factor, level) -> names of the measured runs, by seed.
    """

    runs: dict[str, Run]
    results: dict[tuple[str, str], dict[int, str]]


def change(tree: dict[str, Any], place: str, value: Any) -> None:
    """Sets one value of a stage file.

    Args:
        tree: The file; changed in place.
        place: Dotted keys; inside a list, the name of the class that is meant.
        value: The value.

    Raises:
        UserError: If a list has no such class.
    """
    node: Any = tree
    *path, last = place.split(".")
    for part in path:
        if isinstance(node, list):
            found = [item for item in node if str(item.get("class_path", "")).rsplit(".", 1)[-1] == part]
            if not found:
                raise UserError(f"Expected a class {part} for the override {place!r}, found none. Correct the study.")
            node = found[0]
        else:
            node = node.setdefault(part, {})
    node[last] = value


def _with_seed(value: Any, seed: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_seed(item, seed) for key, item in value.items()}
    return seed if value == SEED else value


def stage_file(study: Study, stage: str, overrides: Sequence[Overrides], folders: Mapping[str, str], seed: int) -> str:
    """Returns a stage file with its overrides applied and its folders replaced.

    Args:
        study: The study.
        stage: Name of the stage.
        overrides: Applied in order.
        folders: Default folder of a stage -> the folder to read from or to write to.
        seed: Stands for `SEED`.
    """
    text = (ROOT / "configs" / study.configs / f"{stage}.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(_moved(text, folders))
    for places in overrides:
        for place, value in places.items():
            change(tree, place, _with_seed(copy.deepcopy(value), seed))
    return yaml.safe_dump(tree, sort_keys=False)


def _moved(text: str, folders: Mapping[str, str]) -> str:
    for old in sorted(folders, key=len, reverse=True):  # `runs/scenes/data` before `runs/scenes`
        text = text.replace(old, folders[old])
    return text


def write_layers(study: Study, out: Path) -> None:
    """Writes the files that the stage files are layered on, with the folders of this study.

    Args:
        study: The study.
        out: Folder of the study.
    """
    source = ROOT / "configs"
    names = (*study.base, *study.stages, *(variant.last for variant in study.variants if variant.last))
    stages = [source / study.configs / f"{stage}.yaml" for stage in names]
    for path in {layer.resolve() for stage in stages for layer in expand_layers(stage, "the study")[:-1]}:
        target = out / "configs" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_moved(path.read_text(encoding="utf-8"), base_folders(study, out)), encoding="utf-8")


def base_folders(study: Study, out: Path) -> dict[str, str]:
    """Returns where the data and the stages that are run once lie."""
    stages = {f"{study.folder}/{name}": str(out / "base" / name) for name in study.base}
    return {study.data_folder: str(out / "base" / "data"), **stages}


def make_plan(study: Study, out: Path, variants: Sequence[Variant], seeds: Sequence[int], quick: bool = False) -> Plan:
    """Plans every run of the chosen variants and of the default.

    Args:
        study: The study.
        out: Folder of the study.
        variants: Those to run; the default is always run.
        seeds: Seeds.
        quick: Whether every stage takes a few steps only.
    """
    maker = _Maker(study, out, quick)
    results: dict[tuple[str, str], dict[int, str]] = {}
    for variant in (DEFAULT, *variants):
        for seed in seeds:
            results.setdefault((variant.factor, variant.level), {})[seed] = maker.chain(variant, seed)
    return Plan(maker.runs, results)


class _Maker:
    def __init__(self, study: Study, out: Path, quick: bool) -> None:
        self.study, self.out = study, out
        self.quick: Overrides = study.quick if quick else {}
        self.runs: dict[str, Run] = {}
        options = study.quick_data if quick else ()
        arguments = ["shards", "build", study.data, "--out", str(out / "base" / "data"), *options]
        self._add("base/data", "data", json.dumps(arguments), ())
        for stage in study.base:
            folders = base_folders(study, out)
            self._add(f"base/{stage}", stage, stage_file(study, stage, [self.quick], folders, 0), ("base/data",))

    def chain(self, variant: Variant, seed: int) -> str:
        """Adds the runs of one variant and seed; returns the name of the last one."""
        study, folders = self.study, base_folders(self.study, self.out)
        after = ("base/data", *(f"base/{stage}" for stage in study.base))
        name, changed = "", False
        stages = (*study.stages[:-1], variant.last or study.stages[-1])
        for stage in stages:
            changed = changed or stage in variant.changes or stage == variant.last
            name = f"seed{seed}/{stage}/{variant.name if changed else 'default'}"
            folders[f"{study.folder}/{stage}"] = str(self.out / name)
            own = [study.seeded, study.every.get(stage, {}), variant.changes.get(stage, {}), self.quick]
            if name not in self.runs:
                config = stage_file(study, stage, own, folders, seed)
                self._add(name, stage, config, after, measured=stage == stages[-1])
            after = (name,)
        return name

    def _add(self, name: str, stage: str, config: str, after: tuple[str, ...], measured: bool = False) -> None:
        before = " ".join(self.runs[other].digest for other in after)
        digest = hashlib.sha256(f"{config} {before}".encode()).hexdigest()
        self.runs[name] = Run(name, stage, config, after, measured, digest)
