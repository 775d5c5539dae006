"""`python -m moextend_pl evaluate`: asks a trained model published test sets and scores it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moextend_pl.contracts import UserError
from moextend_pl.inference.reduction import Reduction

if TYPE_CHECKING:
    from moextend_pl.evaluation.question import Question
    from moextend_pl.evaluation.ranks import Ranks
    from moextend_pl.evaluation.retention_texts import TextSet
    from moextend_pl.models.moextend import MoExtend

FOLDER, RETENTION = "evaluation", "retention.json"


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate` and `rescore` that say how scores are made."""
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run whose kept answers are compared")
    parser.add_argument("--draws", type=int, default=1000, help="sets drawn for intervals (default: 1000)")


def kept_in(run: Path) -> Path:
    """Returns the folder of kept answers of a run, or the folder itself."""
    return run / FOLDER if (run / FOLDER).is_dir() else run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl evaluate", description="Asks a trained model published test sets and scores it."
    )
    parser.add_argument("run", type=Path, help="run directory with manifest.json and delta")
    parser.add_argument("--tasks", default="", help="for example pope,vqav2:lmms_eval; see docs/evaluation.md")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task")
    parser.add_argument(
        "--retention", type=Path, nargs="+", default=[], metavar="FILE", help="texts to measure base beside extended on"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a text predicted in a row (default: 512)")
    parser.add_argument("--out", type=Path, help=f"folder of answers and scores (default: RUN/{FOLDER})")
    parser.add_argument("--limit", type=int, help="ask only so many questions of each task")
    parser.add_argument("--task", default="", help="task of the model, where it was extended for several")
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered together (default: 16)")
    parser.add_argument("--reduce", help="aim: answer from fewer picture tokens, as `generate --reduce`")
    parser.add_argument("--device", default="auto", help="for example cpu or cuda:0; auto takes a GPU if there is one")
    add_scoring(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Asks a model, measures what it still knows, and prints both.

    Raises:
        UserError: If files of a task are missing, the run cannot be read or keeps answers of another model.
    """
    options = _parser().parse_args(argv)
    limit = 1 if options.limit is None else options.limit
    if min(options.batch_size, options.draws, limit, options.length) < 1:
        raise UserError("Expected --batch-size, --draws, --limit and --length of at least 1. Correct them.")
    if not options.tasks and not options.retention:
        raise UserError("Expected --tasks, --retention or both, got neither. Say what is to be measured.")
    if options.tasks and options.data is None:
        raise UserError("Expected --data, the folder with a folder for each of --tasks, got none. Name it.")
    Reduction.parse(options.reduce)
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.evaluation.answering import check_pictures
    from moextend_pl.evaluation.ranks import joined_ranks
    from moextend_pl.evaluation.retention_texts import read_all_texts
    from moextend_pl.evaluation.tasks import TASKS, folder_of, parse_tasks, whole_groups
    from moextend_pl.inference.device import named_device

    tasks = parse_tasks(options.tasks) if options.tasks else {}
    asked = {}
    for name in tasks:
        asked[name] = whole_groups(TASKS[name].questions(folder_of(options.data, name)), options.limit)
        if not asked[name]:
            raise UserError(f"Expected questions of {name} in {options.data}, found none. Look at its files.")
        check_pictures(asked[name], name)
    texts = read_all_texts(options.retention)
    from moextend_pl.models.moextend import MoExtend

    with joined_ranks() as ranks:
        device = named_device(options.device, ranks.local)
        model = MoExtend.load(options.run).to(device)
        if asked:
            _ask(model, tasks, asked, options, ranks)
        if texts and ranks.rank == 0:
            _retain(model, texts, options)
    return 0


def _ask(
    model: MoExtend,
    tasks: dict[str, str],
    asked: dict[str, list[Question]],
    options: argparse.Namespace,
    ranks: Ranks,
) -> None:
    from moextend_pl.evaluation.answering import answers_of, ask, model_facts
    from moextend_pl.evaluation.scoring import score, table, write

    out = options.out or options.run / FOLDER
    facts = {"model": model_facts(options.run), "task": options.task}
    if options.reduce:
        facts["reduce"] = options.reduce
    scored = []
    for name, questions in asked.items():
        answers = answers_of(model, options.task, options.reduce)
        rows = ask(questions, out / name, facts, answers, options.batch_size, ranks)
        if ranks.rank > 0:
            continue
        other = kept_in(options.against) / name if options.against else None
        scored.append(score(name, tasks[name], rows, options.draws, other))
        write(scored[-1], out / name)
    if scored:
        sys.stdout.write(table(scored))


def _retain(model: MoExtend, texts: list[TextSet], options: argparse.Namespace) -> None:
    from moextend_pl.evaluation.retention import measure, table
    from moextend_pl.runs.atomic import write_json

    found = measure(model, texts, options.length)
    write_json((options.out or options.run / FOLDER) / RETENTION, {each.name: each.to_dict() for each in found})
    sys.stdout.write(table(found))
