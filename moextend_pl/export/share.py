"""The small folder of a run to share: its delta and what it needs beside its base."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moextend_pl.contracts import PLAN_FILE
from moextend_pl.export.card import write_card
from moextend_pl.runs.manifest import DELTA_FILE, FOLDERS, read_manifest
from moextend_pl.runs.named import name_of
from moextend_pl.runs.sources import FILES

ENCODER, TOKENIZER, TEMPLATE = "encoder", "tokenizer", "chat_template.jinja"
TOWER_FILES = ("config.json", "preprocessor_config.json", "encoder.json", "*.safetensors", "*.safetensors.index.json")
USE = """```python
import moextend_pl

model = moextend_pl.load("FOLDER")  # or load("FOLDER", base="where the base lies")
model.generate(Image.open("shape.png"), "what color is the shape?")
```

`python -m moextend_pl merge FOLDER --base BASE --out WHOLE` makes a whole model of it, which transformers loads. The
base is found by its name, and refused if one of its tensors is not the one that the delta was trained on."""
"""How a shared folder is used, for its card."""


def share(run: Path, folder: Path, base: str = "", tower: str = "") -> None:
    """Writes the folder: delta, manifest, plan, tokenizer, card, and the tower where no hub has it.

    Args:
        run: Run directory, or a folder that was shared.
        folder: New or empty.
        base: Name of the base, `org/name` for one of a hub; by default that of its folder.
        tower: Name of the tower in a hub, whose weights then stay out.

    Raises:
        UserError: If there is no finished run, or its model has no base, or hears.
    """
    manifest = read_manifest(run)
    manifest.check_hears_not("a folder to share")
    arguments, bases = manifest.model_arguments(), dict(manifest.bases)
    language = arguments["language"]
    base_folder = Path(language["base"])
    bases["language"] = _named(base, base_folder)
    _copy(Path(language["tokenizer"]), folder / TOKENIZER, FILES["tokenizer_path"])
    told = {part: dict(values) for part, values in manifest.model.items()}
    told["language"].update(base=bases["language"]["name"], tokenizer=TOKENIZER)
    if Path(str(language["chat_template"])).is_file():
        shutil.copy(language["chat_template"], folder / TEMPLATE)
        told["language"]["chat_template"] = TEMPLATE
    argument = next(name for name in FOLDERS["encoder"] if arguments["encoder"].get(name))
    tower_folder = Path(arguments["encoder"][argument])
    named = _named(tower, tower_folder)
    if "/" in named["name"]:
        bases["encoder"] = named
        told["encoder"][argument] = named["name"]
    else:
        _copy(tower_folder, folder / ENCODER, TOWER_FILES)
        told["encoder"][argument] = ENCODER
    shutil.copy(manifest.delta(), folder / DELTA_FILE)
    replace(manifest, model=told, bases=bases, run=folder).save()
    if manifest.plans:
        manifest.plans[-1].save(folder / PLAN_FILE)
    write_card(manifest, folder, USE, bases["language"]["name"])


def _named(name: str, folder: Path) -> dict[str, str]:
    known, revision = name_of(folder)
    return {"name": name or known, "revision": revision if name in ("", known) else ""}


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    target.mkdir(parents=True)
    for file in sorted(file for pattern in patterns for file in source.glob(pattern)):
        shutil.copy(file, target / file.name)
