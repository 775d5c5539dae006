"""`python -m moextend_pl report`: a run as one page that needs nothing beside it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_text

log = logging.getLogger(__name__)

PAGE = "report.html"


def main(argv: Sequence[str]) -> int:
    """Writes the page.

    Raises:
        UserError: If the folder holds no run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl report",
        description="Writes what a run, or a folder of runs, has measured as one HTML page without anything beside it.",
    )
    parser.add_argument("run", type=Path, help="run directory, or a folder of run directories")
    parser.add_argument("--out", type=Path, help=f"file to write (default: RUN/{PAGE})")
    options = parser.parse_args(argv)
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.reports.run_facts import find_runs, read_run

    runs = find_runs(options.run)
    if not runs:
        raise UserError(
            f"Expected a run directory, or a folder of some, at {options.run}, found no metrics.csv or stage.json in "
            "it. Give the `trainer.default_root_dir` of a stage."
        )
    from moextend_pl.reports.page import page

    out = options.out or options.run / PAGE
    write_text(out, page(options.run.resolve().name, [read_run(run) for run in runs]))
    log.info("%s shows %d run%s; open it in a browser", out, len(runs), "" if len(runs) == 1 else "s")
    return 0
