"""What a finished run says of itself: what its delta belongs to, and how to build the model again."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moextend_pl.contracts import ExtensionPlan, UserError
from moextend_pl.runs.atomic import read_json, write_atomically, write_json
from moextend_pl.runs.fingerprints import file_sha256
from moextend_pl.runs.named import find_base, name_of
from moextend_pl.runs.sources import refuse_other_sources
from moextend_pl.samples.templates import NAMED_TEMPLATES

log = logging.getLogger(__name__)

DELTA_FILE = "delta.safetensors"
NEW_DELTA_FILE = "delta.new.safetensors"
"""A delta until its manifest is there; the manifest's SHA-256 says which of the two files belongs to it."""
MANIFEST_FILE, MANIFEST_SCHEMA = "manifest.json", 2
ROAD_FILE = "road.json"
"""In a stage's folder while one command runs several: the stage's name, optimizer steps before and after it."""
PACKAGES = ("torch", "lightning", "transformers", "timm", "safetensors")
# Arguments of the model's parts that are folders; a manifest names them relative to its own.
FOLDERS = {"encoder": ("path", "name"), "language": ("base",)}
# What a folder holds, a file that is there in any case, and what names another folder.
CONTENT = {
    "encoder": ("a vision encoder", "", "tower"),
    "language": ("a transformers model", "config.json", "base"),
}
# Arguments of the language model that are places too, where they are given; a template may also be one of ours by name.
FILES = ("tokenizer", "chat_template")
HEARING = "hearing"
"""A part that not every model has; its `path` is a folder too."""


@dataclass(frozen=True)
class Manifest:
    """What a delta belongs to.

    Attributes:
        plans: Extension plans of the model, first one first.
        model: Arguments of tower, projector, language model and `hearing`; folders relative to the run directory.
        trained: Names of the tensors that learned.
        frozen: SHA-256 of every tensor that did not, by its name in the base.
        delta_sha256: SHA-256 of the delta file.
        versions: Versions of Python and of the packages that matter.
        dtype: Type of the weights; the base is read in it again.
        sources: Configurations of tower and base, and the tokenizer, by content; empty in older manifests.
        bases: Name and revision of `language` and `encoder`, where their folders are found by name.
        run: Where the manifest was read from.
    """

    plans: tuple[ExtensionPlan, ...]
    model: dict[str, dict[str, Any]]
    trained: list[str]
    frozen: dict[str, str]
    delta_sha256: str
    versions: dict[str, str]
    dtype: str = "float32"
    sources: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, dict[str, str]] = field(default_factory=dict)
    run: Path = field(default=Path(), compare=False)

    def save(self) -> None:
        """Writes the manifest into its run directory."""
        data = {"schema": MANIFEST_SCHEMA, **asdict(self), "plans": [plan.to_dict() for plan in self.plans]}
        data.pop("run")
        write_json(self.run / MANIFEST_FILE, data)

    def save_with(self, write: Callable[[Path], object]) -> Manifest:
        """Writes a delta and the manifest as one: a run that is killed leaves the older pair or the new one.

        Args:
            write: Writes the delta to the path it is given.

        Returns:
            The manifest with the SHA-256 of the delta.
        """
        new = self.run / NEW_DELTA_FILE
        if new.exists() and file_sha256(new) == read_json(self.run / MANIFEST_FILE).get("delta_sha256"):
            new.replace(self.run / DELTA_FILE)  # a run was killed just before it did that
        write_atomically(new, write)
        manifest = replace(self, delta_sha256=file_sha256(new))
        manifest.save()  # from here on the new pair counts
        new.replace(self.run / DELTA_FILE)
        return manifest

    def delta(self) -> Path:
        """Returns the delta file that belongs to the manifest.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        for path in (self.run / DELTA_FILE, self.run / NEW_DELTA_FILE):
            if path.is_file() and file_sha256(path) == self.delta_sha256:
                return path
        raise UserError(
            f"{self.run / DELTA_FILE}: missing or damaged (its SHA-256 is not the manifest's). Train the stage again."
        )

    def model_arguments(self) -> dict[str, dict[str, Any]]:
        """Returns the arguments of the three parts, with folders that can be opened from here.

        Raises:
            UserError: If a part or its folder is not there.
        """
        arguments = {part: dict(values) for part, values in self.model.items()}
        for part in FOLDERS:
            if part not in arguments:
                raise UserError(
                    f"{self.run} holds no {part}; it can be the start of a stage, but not a model by itself."
                )
            place, (what, file, option) = self.folder(part), CONTENT[part]
            if not (place / file).exists():
                raise UserError(
                    f"Expected {what} in {place}, found no {file or 'folder'}. Run the stage that makes it; or, if it "
                    f"or {self.run} was moved, name its folder by `{option}`, on the command line by `--{option}`."
                )
            arguments[part][_folder_name(arguments[part], part)] = str(place)
        if not arguments["encoder"].get("path"):  # a saved tower says it itself
            # Runs that do not say are of before there was a choice.
            arguments["encoder"] = {"resize": "squash", "resample": "bicubic", **arguments["encoder"]}
        for name in _places(arguments["language"]):
            arguments["language"][name] = os.path.normpath(self.run / arguments["language"][name])
        if HEARING in arguments:
            arguments[HEARING]["path"] = os.path.normpath(self.run / str(arguments[HEARING]["path"]))
        return arguments

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def folder(self, part: str) -> Path:
        """Returns the folder of `encoder` or `language`, as it can be opened from here."""
        place = Path(os.path.normpath(self.run / self.model[part][_folder_name(self.model[part], part)]))
        if part not in self.bases or place.is_dir():
            return place
        return find_base(**self.bases[part], near=self.run.resolve().parent)

    def check_sources(self, files: Mapping[str, Any]) -> None:
        """Refuses to start from a run whose base or tower was configured otherwise; a sense may come later.

        Args:
            files: What a model is made from now, see `runs.sources`.

        Raises:
            UserError: If it is so.
        """
        if self.sources:
            now = {name: v for name, v in files.items() if HEARING in self.model or not name.startswith(f"{HEARING}/")}
            advice = "Restore the files, or train that stage again."
            refuse_other_sources({"files": self.sources}, {"files": now}, ["files"], str(self.run), advice)

    def check_hears_not(self, what: str) -> None:
        """Refuses a model that hears where nothing knows of sounds yet.

        Args:
            what: What has no place for them.

        Raises:
            UserError: If it does.
        """
        if HEARING in self.model:
            raise UserError(
                f"Expected a model that does not hear, got {self.run} with `hearing`: {what} has no place for sounds "
                "yet. Ask it by `generate` or `chat`."
            )

    def with_folders(self, base: str | Path | None, tower: str | Path | None) -> Manifest:
        """Returns the same with other folders; whether they hold the same is found out when they are read.

        Args:
            base: Folder of the language model, with its tokenizer; None for the one that the run says.
            tower: Folder of the vision tower, likewise.
        """
        model = {part: dict(values) for part, values in self.model.items()}
        if base is not None and (language := model.get("language")):
            place = os.path.relpath(base, self.run)
            moved = ["base", *(["tokenizer"] if language.get("tokenizer") == language.get("base") else [])]
            language.update(dict.fromkeys(moved, place))
        if tower is not None and (encoder := model.get("encoder")):
            encoder[_folder_name(encoder, "encoder")] = os.path.relpath(tower, self.run)
        return replace(self, model=model)


def _folder_name(arguments: Mapping[str, Any], part: str) -> str:
    return next(name for name in FOLDERS[part] if arguments.get(name))


def relative_arguments(arguments: dict[str, dict[str, Any]], run: Path) -> dict[str, dict[str, Any]]:
    """Returns arguments of the model's parts with their folders and files named from a run directory."""
    told = {part: dict(values) for part, values in arguments.items()}
    for part in FOLDERS:
        name = _folder_name(told[part], part)
        told[part][name] = os.path.relpath(told[part][name], run)
    for name in _places(told["language"]):
        told["language"][name] = os.path.relpath(told["language"][name], run)
    if HEARING in told:
        told[HEARING]["path"] = os.path.relpath(told[HEARING]["path"], run)
    return told


def hub_names(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Returns name and revision of each part whose folder lies in the cache of a hub, to be had again from there."""
    found = {part: name_of(Path(str(arguments[part][_folder_name(arguments[part], part)]))) for part in FOLDERS}
    return {part: {"name": name, "revision": revision} for part, (name, revision) in found.items() if revision}


def _places(language: Mapping[str, Any]) -> list[str]:
    return [name for name in FILES if language.get(name) not in (None, *NAMED_TEMPLATES)]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def manifest_path(run: Path) -> Path:
    """Returns where the manifest of a run directory, or of a delta file in one, lies."""
    return (run if run.is_dir() else run.parent) / MANIFEST_FILE


def _check_types(data: Mapping[str, Any], dtype: Any) -> None:
    """Refuses what would be noticed only where it is used.

    Raises:
        TypeError: If it is so.
    """
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise TypeError(f"`dtype` {dtype!r} is no type of weights")
    frozen, model = data["frozen"], data["model"]
    if not all(isinstance(values, dict) for values in (frozen, model, *dict(model).values())):
        raise TypeError("`model` and `frozen` are no mappings")
    if not all(isinstance(text, str) for text in (*frozen.values(), *data["trained"], data["delta_sha256"])):
        raise TypeError("`frozen`, `trained` and `delta_sha256` are no texts")
    for part, names in FOLDERS.items():
        places = [model[part].get(name) for name in names] if part in model else [""]
        if not all(isinstance(place, str | None) for place in places) or places == [None] * len(places):
            raise TypeError(f"`{part}` names no folder")
    if not all(isinstance(model.get("language", {}).get(name), str | None) for name in FILES):
        raise TypeError(f"{FILES} are no places")


def read_manifest(run: Path) -> Manifest:
    """Reads the manifest of a finished run.

    Args:
        run: Run directory, or a delta file in one.

    Raises:
        UserError: If there is none, or it is of another schema.
    """
    path = manifest_path(run)
    if not path.is_file():
        raise UserError(f"Expected a finished run in {run}, found no {MANIFEST_FILE}. Run that stage to its end first.")
    names = ("model", "trained", "frozen", "delta_sha256", "versions")
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != MANIFEST_SCHEMA:
            raise UserError(
                f"{path}: expected schema {MANIFEST_SCHEMA}, got {data.get('schema')!r}. Train the stage again."
            )
        plans = tuple(ExtensionPlan.from_dict(plan, origin=str(path)) for plan in data["plans"])
        dtype = data.get("dtype", "float32")
        _check_types(data, dtype)
        sources, bases = dict(data.get("sources", {})), dict(data.get("bases", {}))
        facts = {name: data[name] for name in names}
        return Manifest(plans=plans, run=path.parent, dtype=dtype, sources=sources, bases=bases, **facts)
    except UserError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}). Train the stage again.") from error
