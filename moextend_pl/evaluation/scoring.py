"""Scores of kept answers, as files and as the table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moextend_pl.evaluation.answering import read_predictions, records
from moextend_pl.evaluation.intervals import DRAWS, Difference, Interval, bootstrap, paired
from moextend_pl.evaluation.metrics.keyed import unique
from moextend_pl.evaluation.tasks import TASKS
from moextend_pl.runs.atomic import write_json


@dataclass(frozen=True)
class Scored:
    """The scores of one task.

    Attributes:
        task: Its name.
        protocol: Rule of the scores.
        questions: How many were answered.
        scores: Intervals by name.
        differences: To another run, by name; empty where there is none.
    """

    task: str
    protocol: str
    questions: int
    scores: dict[str, Interval]
    differences: dict[str, Difference]


def score(
    task: str, protocol: str, rows: Sequence[dict[str, Any]], draws: int = DRAWS, against: Path | None = None
) -> Scored:
    """Scores the answers to a task.

    Args:
        task: Its name.
        protocol: Rule of the scores; empty for the usual one.
        rows: Kept answers.
        draws: Sets drawn for intervals.
        against: Folder of the same task in another run.

    Raises:
        UserError: If answers cannot be scored, or those of the other run are to other questions.
    """
    metric = TASKS[task].metric(protocol)
    units = metric.units(unique(records(rows)))
    differences: dict[str, Difference] = {}
    if against is not None:
        differences = paired(metric, units, metric.units(unique(records(read_predictions(against)))), draws)
    name = protocol or next(iter(TASKS[task].protocols))
    return Scored(task, name, len(rows), bootstrap(metric, units, draws), differences)


def write(scored: Scored, folder: Path) -> None:
    """Writes `scores_PROTOCOL.json` beside the answers."""
    write_json(folder / f"scores_{scored.protocol}.json", asdict(scored))


def table(scored: Sequence[Scored]) -> str:
    """Returns the numbers that papers report, a line each, with their intervals."""
    lines = [f"{'task':<12} {'protocol':<12} {'score':<20} {'value':>9}  {'95 % interval':<20} {'questions':>9}"]
    for each in scored:
        name = TASKS[each.task].headline
        value = each.scores.get(name)
        if value is None:  # a set without pictures has no score of those with one
            name, value = next(iter(each.scores.items()))
        between = f"{value.low:.4f} to {value.high:.4f}"
        start = f"{each.task:<12} {each.protocol:<12} {name:<20}"
        lines.append(f"{start} {value.value:>9.4f}  {between:<20} {each.questions:>9}")
        if name in each.differences:
            other = each.differences[name]
            between = f"{other.low:+.4f} to {other.high:+.4f}"
            lines.append(
                f"{'':<12} {'':<12} {'less the other run':<20} {other.value:>+9.4f}  {between:<20} p = {other.p:.3f}"
            )
    return "\n".join(lines) + "\n"
