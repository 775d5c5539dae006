"""`python -m moextend_pl export`: a finished run to a folder for other tools."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_folder

log = logging.getLogger(__name__)

TARGETS = {"hf": "a whole model, which transformers loads after `import moextend_pl`"}


def main(argv: Sequence[str]) -> int:
    """Writes the folder.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    targets = "; ".join(f"{name}: {text}" for name, text in TARGETS.items())
    parser = argparse.ArgumentParser(prog="python -m moextend_pl export", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory with manifest.json and delta")
    parser.add_argument("--target", choices=TARGETS, default="hf", help=targets)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--task", default="", help="task of all questions, where the model was extended for several")
    parser.add_argument("--shard", default="5GB", help="largest file of weights")
    options = parser.parse_args(argv)
    check_new(options.out, "--out")
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.export.folder import export_run

    write_folder(options.out, lambda folder: export_run(options.run, folder, options.task, options.shard))
    log.info("%s holds the model", options.out)
    return 0


def check_new(folder: Path, option: str) -> None:
    """Refuses a folder that holds something.

    Raises:
        UserError: If it does, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        got = "which has files" if folder.is_dir() else "which is a file"
        raise UserError(f"Expected a new or empty folder for `{option}`, got {folder}, {got}. Name another one.")
