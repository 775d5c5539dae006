"""`python -m moextend_pl evaluate`: asks a trained model published test sets and scores it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError

FOLDER = "evaluation"


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate` and `rescore` that say how scores are made."""
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run whose kept answers are compared")
    parser.add_argument("--draws", type=int, default=1000, help="sets drawn for intervals (default: 1000)")


def kept_in(run: Path) -> Path:
    """Returns the folder of kept answers of a run, or the folder itself."""
    return run / FOLDER if (run / FOLDER).is_dir() else run


def main(argv: Sequence[str]) -> int:
    """Asks a model and prints its scores.

    Raises:
        UserError: If files of a task are missing, the run cannot be read or keeps answers of another model.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl evaluate", description="Asks a trained model published test sets and scores it."
    )
    parser.add_argument("run", type=Path, help="run directory with manifest.json and delta")
    parser.add_argument("--tasks", required=True, help="for example pope,vqav2:lmms_eval; see docs/evaluation.md")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--out", type=Path, help=f"folder of answers and scores (default: RUN/{FOLDER})")
    parser.add_argument("--limit", type=int, help="ask only so many questions of each task")
    parser.add_argument("--task", default="", help="task of the model, where it was extended for several")
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered together (default: 16)")
    add_scoring(parser)
    options = parser.parse_args(argv)
    if min(options.batch_size, options.draws, options.limit or 1) < 1:
        raise UserError("Expected --batch-size, --draws and --limit of at least 1. Correct them.")
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.evaluation.answering import answers_of, ask, check_pictures, model_facts
    from moextend_pl.evaluation.scoring import score, table, write
    from moextend_pl.evaluation.tasks import TASKS, folder_of, parse_tasks, whole_groups

    tasks = parse_tasks(options.tasks)
    asked = {}
    for name in tasks:
        asked[name] = whole_groups(TASKS[name].questions(folder_of(options.data, name)), options.limit)
        check_pictures(asked[name], name)
    from moextend_pl.models.moextend import MoExtend

    model = MoExtend.load(options.run)
    out, facts, answers = options.out or options.run / FOLDER, model_facts(options.run), answers_of(model, options.task)
    scored = []
    for name, questions in asked.items():
        rows = ask(questions, out / name, {"model": facts, "task": options.task}, answers, options.batch_size)
        other = kept_in(options.against) / name if options.against else None
        scored.append(score(name, tasks[name], rows, options.draws, other))
        write(scored[-1], out / name)
    sys.stdout.write(table(scored))
    return 0
