"""`python -m moextend_pl extend`: from own data to an extended model, by stage files to be edited."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_pl.cli.commands import run
from moextend_pl.contracts import PLAN_FILE, ExtensionPlan, LayerGrowth, UserError
from moextend_pl.extend.stage_files import STAGES, Wish, stage_files
from moextend_pl.quickstart.command import DIGEST, stage_is_finished
from moextend_pl.runs.atomic import read_json, write_json, write_text

log = logging.getLogger(__name__)

SAVED_TOWER, INDEX, SOURCE = "encoder.json", "index.json", "source.json"
WRITTEN = ".written.json"
"""The stage files as they were written, to tell what a person has edited since."""

LENGTH = 2048
"""Longest sequence in tokens, as LLaVA-1.5's; less where the base takes less."""

PURPOSES = {
    "1_align": "the projector learns to put pictures into the model's words",
    "2_probe": "the routers learn for a moment; the layers that shift most are chosen",
    "3_extend": "new experts learn",
}
ASK = """\
The extended model is in {run}; how it learned is in {out}/report.html. Next:
  python -m moextend_pl generate --checkpoint {run} --image PICTURE --prompt "a question"
  python -m moextend_pl export {run} --target hf --out {out}/model
  python -m moextend_pl fit --config {out}/configs/3_extend.yaml --fresh    # after you edited it
"""


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command; further options `--trainer.*` go to every stage."""
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl extend",
        description="Makes shards of your data, writes the files of three stages (align, probe, extend) to OUT/configs "
        "and runs them. The same command goes on where a stopped one was; files that you edited stay as they are.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, help="language model with experts: a folder, or org/name in a hub")
    add("--tower", required=True, help="vision tower: a folder, or org/name in a hub")
    add("--data", type=Path, required=True, help="your data, as `shards build data` reads them, or a folder of shards")
    add("--val", type=Path, help="shards to measure on (default: some of the pictures are held out)")
    add("--out", type=Path, required=True, help="folder of all that is written")
    add("--dry-run", action="store_true", help="make the shards, write the stage files and plan them; train nothing")
    add("--gpu", help="card to plan for, as for `plan`")
    add("--batch-size", type=int, default=16, help="samples of a step (default %(default)s)")
    add("--epochs", type=float, default=1.0, help="how often a sample is seen, at least (default %(default)s)")
    for name in ("images", "question", "columns"):
        add(f"--{name}", help="as for `shards build data`")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    options, overrides = options_parser().parse_known_args(argv)
    if unknown := [word for word in overrides if not (word.startswith("--trainer.") and "=" in word)]:
        raise UserError(f"extend does not accept {unknown[0]!r}; it takes --help and --trainer.KEY=VALUE.")
    if options.batch_size < 1 or not 0 < options.epochs < math.inf:
        raise UserError(
            f"Expected `--batch-size` and `--epochs` above 0, got {options.batch_size} and {options.epochs:g}."
        )
    if options.val is not None and not (options.val / INDEX).is_file():
        raise UserError(
            f"Expected shards with {INDEX} at {options.val} for `--val`, found none. Make them with `shards build "
            "data`, or leave `--val` out."
        )
    # Models are looked at before hours go into data.
    base, tower = model_folder(options.base, "--base"), model_folder(options.tower, "--tower")
    facts = _facts(base)
    train, val = _shards(options)
    wish = Wish(
        out=options.out,
        base=base,
        tower=tower,
        is_saved_tower=(tower / SAVED_TOWER).is_file(),
        train=train,
        val=val,
        samples=_samples(train),
        batch=options.batch_size,
        epochs=options.epochs,
        **facts,
    )
    write_stages(wish)
    if options.dry_run:
        return _plan(wish, options.gpu)
    _run_stages(wish, overrides)
    run(["report", str(wish.out)])
    sys.stdout.write(ASK.format(run=wish.out / STAGES[-1], out=wish.out))
    return 0


def model_folder(name: str, option: str) -> Path:
    """Returns the folder of a model, fetched from a hub where no folder has the name.

    Args:
        name: Folder, or `org/name`; the commit that is fetched is part of the folder's name, and so of the stage files.
        option: Who asks, for the error message.

    Raises:
        UserError: If there is neither.
    """
    from moextend_pl.runs.named import CONFIGURATIONS, HUB_NAME, from_hub

    folder = Path(name)
    if not folder.exists() and HUB_NAME.fullmatch(name):
        log.info("fetching %s, or taking it from the hub's cache", name)
        folder = from_hub(name)
    if not any((folder / file).is_file() for file in CONFIGURATIONS):
        raise UserError(
            f"Expected a model's folder or org/name of a hub for `{option}`, got {name!r}, in which there is none of "
            f"{', '.join(CONFIGURATIONS)}."
        )
    return folder


def _facts(base: Path) -> dict[str, Any]:
    """Returns width and longest sequence of a language model, and the precision in which it is trained here."""
    import torch

    from moextend_pl.models.model_folder import read_config

    config = read_config(str(base)).get_text_config()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {
        "width": int(config.hidden_size),
        "length": min(int(getattr(config, "max_position_embeddings", None) or LENGTH), LENGTH),
        "precision": "bf16-true" if on_gpu else "32-true",
    }


def _shards(options: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the shards to learn from and those to measure on; makes them of data that are none."""
    data: Path = options.data
    if (data / INDEX).is_file() or any(data.glob("*.tar")):
        if not (data / INDEX).is_file():
            run(["shards", "index", str(data)])
        if options.val is None:
            log.warning("no `--val`: the stages are measured on samples that they learned from")
        return data, options.val or data
    train, val = options.out / "data" / "train", options.out / "data" / "val"
    asked = {name: str(getattr(options, name)) for name in ("data", "images", "question", "columns", "val")}
    asked["seen"] = state_of(data, *([Path(options.images)] if options.images else []))
    made = [train] if options.val else [train, val]
    if read_json(train.parent / SOURCE) == asked and all((folder / INDEX).is_file() for folder in made):
        log.info("shards are there already; delete %s to make them anew", train.parent)
        return train, options.val or val
    arguments = ["shards", "build", "data", str(data), "--out", str(train)]
    arguments += [] if options.val else ["--val", str(val)]
    for name in ("images", "question", "columns"):
        arguments += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    log.info("[data] shards of %s", data)
    run(arguments)
    write_json(train.parent / SOURCE, asked)
    return train, options.val or val


def state_of(*places: Path) -> str:
    """Returns a digest of names, sizes and times of files, by which data that were added to are told from the same."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                facts = path.stat()
                digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _samples(folder: Path) -> int:
    return sum(int(shard["samples"]) for shard in read_json(folder / INDEX)["shards"])


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


def _plan(wish: Wish, gpu: str | None) -> int:
    """Plans all stages; which layers grow is not known yet, so that the upper half of them stands for those."""
    from moextend_pl.models.model_folder import read_config

    layers = int(read_config(str(wish.base)).get_text_config().num_hidden_layers)
    growths = tuple(LayerGrowth(layer, (0,)) for layer in range(layers - max(layers // 2, 1), layers))
    ExtensionPlan(layers=growths).save(wish.out / "configs" / PLAN_FILE)
    for name in STAGES:
        sys.stdout.write(f"\n{name}: {PURPOSES[name]}\n")
        run(["plan", "--config", str(wish.out / "configs" / f"{name}.yaml"), *(["--gpu", gpu] if gpu else [])])
    return 0


def _run_stages(wish: Wish, overrides: Sequence[str]) -> None:
    """Runs every stage that is not finished as its file says now, and those after it."""
    shared = [wish.out / "configs" / "model.yaml", wish.train / INDEX, wish.val / INDEX]
    digest = hashlib.sha256(" ".join(overrides).encode())
    for path in shared:
        digest.update(path.read_bytes())
    for number, name in enumerate(STAGES, start=1):
        config, folder = wish.out / "configs" / f"{name}.yaml", wish.out / name
        digest.update(config.read_bytes())
        asked, known = digest.hexdigest(), folder / DIGEST
        is_same = known.is_file() and known.read_text() == asked
        log.info("[%d/%d] %s: %s", number, len(STAGES), name, PURPOSES[name])
        if is_same and stage_is_finished(folder):
            log.info("%s is there already", name)
            continue
        begin, fresh = time.monotonic(), folder.exists() and not is_same
        if fresh:
            log.info("what %s is made from changed: it starts anew", name)
        write_text(known, asked)
        run(["fit", "--config", str(config), *(["--fresh"] if fresh else []), *overrides])
        log.info("%s took %.1f min", name, (time.monotonic() - begin) / 60)
