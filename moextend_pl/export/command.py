"""`python -m moextend_pl export`: a finished run to a folder for other tools."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_folder

log = logging.getLogger(__name__)

SIZE = re.compile(r"[1-9][0-9]*[KMGT]B")
HF, DELTA = "hf", "delta"
TARGETS = {
    HF: "a whole model, which transformers loads after `import moextend_pl`",
    DELTA: "the small folder to share, without base",
}


def main(argv: Sequence[str]) -> int:
    """Writes the folder.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    targets = "; ".join(f"{name}: {text}" for name, text in TARGETS.items())
    parser = argparse.ArgumentParser(prog="python -m moextend_pl export", description="Writes a run for other tools.")
    parser.add_argument("run", type=Path, help="run directory with manifest.json and delta")
    parser.add_argument("--target", choices=TARGETS, default=HF, help=targets)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--base", default="", help="hf: where the base lies now; delta: its name, org/name in a hub")
    parser.add_argument("--tower", default="", help="delta: name of the tower in a hub, whose weights then stay out")
    add_model_options(parser)
    options = parser.parse_args(argv)
    check_new(options.out)
    unused = ("task", "shard") if options.target == DELTA else ("tower",)
    for name in unused:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name} says nothing for `--target {options.target}`, see --help. Leave it out.")
    # Imported when the arguments are known to be right: it takes seconds.
    if options.target == DELTA:
        from moextend_pl.export.share import share

        write_folder(options.out, lambda folder: share(options.run, folder, options.base, options.tower))
    else:
        write_whole_model(options, options.run)
    log.info("%s holds %s", options.out, TARGETS[options.target])
    return 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a whole model."""
    parser.add_argument("--task", default="", help="task of all questions, where the model was extended for several")
    parser.add_argument("--shard", default="5GB", help="largest file of weights")


def write_whole_model(options: argparse.Namespace, run: Path) -> None:
    """Writes the model of a run as its options say.

    Args:
        options: `out`, `base` and those of `add_model_options`.
        run: Run directory.

    Raises:
        UserError: If the base is no folder, or there is no such run.
    """
    if options.base and not Path(options.base).exists():
        raise UserError(f"Expected the folder of the base as `--base`, got {options.base}, which is none. Correct it.")
    if not SIZE.fullmatch(options.shard):
        raise UserError(f"Expected --shard such as 5GB or 500MB, got {options.shard!r}. Correct it.")
    from moextend_pl.export.folder import export_run

    base = options.base or None
    write_folder(options.out, lambda folder: export_run(run, folder, options.task, options.shard, base))


def check_new(folder: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        UserError: If it does, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        got = "which has files" if folder.is_dir() else "which is a file"
        raise UserError(f"Expected a new or empty folder for `--out`, got {folder}, {got}. Name another one.")
