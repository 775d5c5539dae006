"""`python -m moextend_pl convert`: published checkpoints to this project's files and back."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.convert.incoming import REPORT, convert_in
from moextend_pl.convert.outgoing import convert_out
from moextend_pl.convert.published import LAYOUTS

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Converts, and says where the report lies.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl convert", description=__doc__)
    parser.add_argument("layout", choices=LAYOUTS, help="the published layout")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="file or folder to read")
    parser.add_argument("--to", dest="target", type=Path, required=True, help="folder to make")
    parser.add_argument("--back", action="store_true", help="from a run directory to the published layout")
    parser.add_argument("--heads", type=int, help="attention heads of the tower; by default one for 64 channels")
    arguments = parser.parse_args(argv)
    target, heads = arguments.target, arguments.heads
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        got = "which has files" if target.is_dir() else "which is a file"
        raise UserError(f"Expected a new or empty folder for `--to`, got {target}, {got}. Name another one.")
    if heads is not None and heads < 1:
        raise UserError(f"Expected `--heads` of at least 1, got {heads}. Take the number from the tower's config.")
    if arguments.back:
        report = convert_out(arguments.source, arguments.target, arguments.layout)
    else:
        report = convert_in(arguments.source, arguments.target, arguments.layout, arguments.heads)
    log.info("%d tensors; what became of each is in %s", len(report["tensors"]), arguments.target / REPORT)
    return 0
