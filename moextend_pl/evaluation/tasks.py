"""The tasks by name: where a set is read, by which rule it is scored, and which of its numbers papers report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.evaluation import choice_layouts, layouts
from moextend_pl.evaluation.metrics import (
    ANLS,
    CIDErD,
    CircularAccuracy,
    ExactMatch,
    GQAAccuracy,
    KeyedMetric,
    MMEScore,
    POPEScore,
    ScienceQAAccuracy,
    VQAAccuracy,
)
from moextend_pl.evaluation.question import Question


@dataclass(frozen=True)
class Task:
    """A test set and its score.

    Attributes:
        questions: Reads the set out of its folder.
        protocols: Metrics by the name of their rule, the usual one first.
        headline: Name of the number that papers report.
        folder: Name of its folder.
    """

    questions: Callable[[Path], Iterator[Question]]
    protocols: dict[str, Callable[[], KeyedMetric]]
    headline: str
    folder: str

    def metric(self, protocol: str) -> KeyedMetric:
        """Returns a fresh metric; the usual one for an empty name."""
        return self.protocols[protocol or next(iter(self.protocols))]()


TASKS = {
    "vqav2": Task(
        layouts.vqav2, {"official": VQAAccuracy, "lmms_eval": lambda: VQAAccuracy("lmms_eval")}, "accuracy", "vqav2"
    ),
    "textvqa": Task(layouts.textvqa, {"evalai": lambda: VQAAccuracy("evalai")}, "accuracy", "textvqa"),
    "textvqa_ocr": Task(layouts.textvqa_ocr, {"evalai": lambda: VQAAccuracy("evalai")}, "accuracy", "textvqa"),
    "gqa": Task(layouts.gqa, {"llava": GQAAccuracy}, "accuracy", "gqa"),
    "pope": Task(layouts.pope, {"llava": POPEScore, "lmms_eval": lambda: POPEScore("lmms_eval")}, "mean_f1", "pope"),
    "mme": Task(layouts.mme, {"official": MMEScore}, "perception", "mme"),
    "scienceqa": Task(choice_layouts.scienceqa, {"llava": ScienceQAAccuracy}, "accuracy/IMG", "scienceqa"),
    "mmbench": Task(choice_layouts.mmbench, {"exact": CircularAccuracy}, "circular", "mmbench"),
    "captions": Task(layouts.captions, {"cider_d": CIDErD}, f"cider_d[{CIDErD.tokenizer}]", "captions"),
    "docvqa": Task(layouts.docvqa, {"anls": ANLS}, "anls", "docvqa"),
    "infovqa": Task(layouts.infovqa, {"anls": ANLS}, "anls", "infovqa"),
    "own": Task(layouts.own, {"exact_match": ExactMatch, "anls": ANLS}, "exact_match", "own"),
}


def parse_tasks(text: str) -> dict[str, str]:
    """Reads `pope,vqav2:lmms_eval` into protocols by task; an empty one is the usual.

    Raises:
        UserError: If there is no such task or protocol, or a task stands twice.
    """
    found = {}
    for item in text.split(","):
        name, _, protocol = item.strip().partition(":")
        if name not in TASKS:
            raise UserError(f"Expected tasks out of {', '.join(TASKS)}, got {name!r}.")
        if protocol and protocol not in TASKS[name].protocols:
            raise UserError(
                f"Expected a protocol of {name} out of {', '.join(TASKS[name].protocols)}, got {protocol!r}."
            )
        if name in found:
            raise UserError(f"Expected each task once, got {name} twice. `rescore` makes scores by another protocol.")
        found[name] = protocol
    return found


def folder_of(data: Path, name: str) -> Path:
    """Returns the folder of a task, whatever the case of its name.

    Raises:
        UserError: If there is none.
    """
    wanted = TASKS[name].folder
    for path in sorted(data.iterdir()) if data.is_dir() else []:
        if path.is_dir() and path.name.lower() == wanted:
            return path
    raise UserError(
        f"Expected the files of {name} in {data / wanted}, found no such folder. Name its parent by --data."
    )


def whole_groups(questions: Iterable[Question], limit: int | None) -> list[Question]:
    """Returns the first questions, up to a limit and then to the end of the group that it cuts.

    Raises:
        UserError: If two questions have the same key, so that one would be lost.
    """
    found: dict[str, Question] = {}
    groups: set[str] = set()
    for question in questions:
        if limit is not None and len(found) >= limit and question.group not in groups:
            if not question.group:
                break
            continue
        if question.key in found:
            raise UserError(f"Expected questions with keys of their own, got {question.key} twice. Mend the file.")
        found[question.key] = question
        groups |= {question.group} if question.group else set()
    return list(found.values())
