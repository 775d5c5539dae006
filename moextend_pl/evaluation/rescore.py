"""`python -m moextend_pl rescore`: scores kept answers again, without the model and its data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.command import add_scoring, kept_in


def main(argv: Sequence[str]) -> int:
    """Scores kept answers again, without the model and its data.

    Raises:
        UserError: If nothing is kept.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl rescore", description="Scores kept answers again, without the model and its data."
    )
    parser.add_argument("run", type=Path, help="run directory, or folder of answers, of an earlier `evaluate`")
    parser.add_argument("--tasks", help="for example pope:lmms_eval (default: all that are kept)")
    add_scoring(parser)
    options = parser.parse_args(argv)
    if options.draws < 1:
        raise UserError(f"Expected --draws of at least 1, got {options.draws}. Correct it.")
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.evaluation.answering import PREDICTIONS, read_predictions
    from moextend_pl.evaluation.scoring import score, table, write
    from moextend_pl.evaluation.tasks import TASKS, parse_tasks

    kept = kept_in(options.run)
    there = [name for name in TASKS if (kept / name / PREDICTIONS).is_file()]
    tasks = parse_tasks(options.tasks) if options.tasks else dict.fromkeys(there, "")
    if not tasks:
        raise UserError(f"Expected kept answers of a task in {kept}, found none. Run `evaluate` first.")
    scored = []
    for name, protocol in tasks.items():
        other = kept_in(options.against) / name if options.against else None
        scored.append(score(name, protocol, read_predictions(kept / name), options.draws, other))
        write(scored[-1], kept / name)
    sys.stdout.write(table(scored))
    return 0
