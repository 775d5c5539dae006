"""The stages one after the other: their files, which a person may edit, and their run with one display of progress."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from moextend_pl.cli.commands import run
from moextend_pl.contracts import UserError
from moextend_pl.extend.own_data import INDEX
from moextend_pl.extend.stage_files import STAGES, Wish, stage_files
from moextend_pl.quickstart.runner import DIGEST, stage_is_finished
from moextend_pl.runs.atomic import read_json, write_json, write_text
from moextend_pl.runs.manifest import ROAD_FILE

log = logging.getLogger(__name__)

WRITTEN = ".written.json"
"""The stage files as they were written, to tell what a person has edited since."""

PURPOSES = {
    "1_align": "the projector learns to put pictures into the model's words",
    "2_probe": "the routers learn for a moment; the layers that shift most are chosen",
    "3_extend": "new experts learn",
}
PARTS = len(STAGES) + 1
"""Parts of the road: the data are the first."""


def write_stages(wish: Wish) -> None:
    """Writes the stage files; one that a person has edited stays.

    Raises:
        UserError: If options or data are others than those that an edited file was written for.
    """
    place = wish.out / "configs" / WRITTEN
    before, now = read_json(place), stage_files(wish)
    theirs = {}
    for name, text in now.items():
        path = wish.out / "configs" / name
        there = path.read_text(encoding="utf-8") if path.is_file() else None
        if there not in (None, text, before.get(name)):
            theirs[path] = before.get(name) == text
    if changed := [path for path, is_same in theirs.items() if not is_same]:
        raise UserError(
            f"Expected the options and data that {changed[0]} was written for, got others, and it was edited since. "
            "Delete it to have it written anew, or name another `--out`."
        )
    for name, text in now.items():
        path = wish.out / "configs" / name
        if path in theirs:
            log.info("%s stays as you edited it; delete it to have it written anew", path)
        else:
            write_text(path, text)
    write_json(place, now)


def run_stages(wish: Wish, overrides: Sequence[str]) -> None:
    """Runs every stage that is not finished as its file says now, and those after it."""
    shared = [wish.out / "configs" / "model.yaml", wish.train / INDEX, wish.val / INDEX]
    digest = hashlib.sha256(" ".join(overrides).encode())
    for path in shared:
        digest.update(path.read_bytes())
    configs = [wish.out / "configs" / f"{name}.yaml" for name in STAGES]
    steps = [steps_of(config, overrides) for config in configs]
    for number, (name, config) in enumerate(zip(STAGES, configs, strict=True)):
        folder = wish.out / name
        digest.update(config.read_bytes())
        asked, known = digest.hexdigest(), folder / DIGEST
        is_same = known.is_file() and known.read_text() == asked
        log.info("[%d/%d] %s: %s", number + 2, PARTS, name, PURPOSES[name])
        if is_same and stage_is_finished(folder):
            log.info("%s is there already", name)
            continue
        begin, fresh = time.monotonic(), folder.exists() and not is_same
        if fresh:
            log.info("what %s is made from changed: it starts anew", name)
        write_text(known, asked)
        stage = f"stage {number + 2} of {PARTS}, {name}"
        write_json(
            folder / ROAD_FILE, {"stage": stage, "before": sum(steps[:number]), "after": sum(steps[number + 1 :])}
        )
        try:
            run(["fit", "--config", str(config), *(["--fresh"] if fresh else []), *overrides])
        finally:
            (folder / ROAD_FILE).unlink(missing_ok=True)
        log.info("%s took %.1f min", name, (time.monotonic() - begin) / 60)


def steps_of(config: Path, overrides: Sequence[str]) -> int:
    """Returns the optimizer steps of a stage as its file and the command line say; 0 where they leave them open."""
    told = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("trainer") or {}
    given = [word.partition("=")[2] for word in overrides if word.startswith("--trainer.max_steps=")]
    steps = str([told.get("max_steps", 0), *given][-1])
    return int(steps) if steps.isdecimal() else 0
