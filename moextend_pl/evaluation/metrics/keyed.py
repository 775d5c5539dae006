"""A metric that remembers which sample it has seen, so that no sample counts twice on however many ranks.

Samplers of several processes repeat samples until all ranks have equally many, and most published scores are no mean
over samples. So the state is the answers themselves with the keys of their samples; each rank keeps its own, and they
are joined and told apart by key when the score is asked for.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

Sums = dict[str, float]
"""Named sums of one unit of a test set."""
Totals = Mapping[str, Any]
"""Named sums over many units: numbers, or arrays with one number for each of several draws."""


class Record(TypedDict):
    """One answered question."""

    key: str  # name of the sample in its set
    prediction: str  # what the model said
    truth: Any  # what was expected, as the protocol has it; plain data


def ratio(part: Any, whole: Any) -> np.ndarray:
    """Divides, numbers or arrays; 0 where there is nothing to divide by."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def unique(records: Iterable[Record]) -> list[Record]:
    """Returns the first record of each key, in their order."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record["key"], record)
    return list(first.values())


class KeyedMetric(Metric):
    """Collects answers by the keys of their samples and scores them by a published protocol.

    A score is made in two steps, so that intervals can be drawn without asking a model again: `units` gives named sums
    for each unit that is drawn independently (a sample, or all questions about one picture), `values` turns sums over
    units into the score. `score` does both on plain records, without any state.
    """

    full_state_update = False
    higher_is_better = True
    protocol: ClassVar[str] = ""
    """What the number is: the rule it follows, in a few words."""

    answers: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Text has to travel between ranks as a tensor: one line of JSON for each answer, as bytes.
        self.add_state("answers", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def units(self, records: Sequence[Record]) -> dict[str, Sums]:
        """Returns named sums by unit."""

    @abstractmethod
    def values(self, totals: Totals) -> dict[str, Any]:
        """Returns the scores by name from sums over units; works on arrays element by element."""

    def update(self, keys: Sequence[str], predictions: Sequence[str], truths: Sequence[Any]) -> None:
        """Adds answers.

        Args:
            keys: Names of the samples; an empty one is a filler and does not count.
            predictions: What the model said.
            truths: What was expected, as the metric's class says; plain data.
        """
        rows = zip(keys, predictions, truths, strict=True)
        lines = [json.dumps({"key": k, "prediction": p, "truth": t}) + "\n" for k, p, t in rows if k]
        # json.dumps writes ASCII, so that a byte is a character and no line breaks inside of a record.
        data = np.frombuffer("".join(lines).encode("ascii"), dtype=np.uint8).copy()
        self.answers.append(torch.from_numpy(data).to(self.device))

    def records(self) -> list[Record]:
        """Returns the answers so far, each sample once; inside of `compute` those of all ranks."""
        parts = self.answers if isinstance(self.answers, list) else [self.answers]
        text = b"".join(part.cpu().numpy().tobytes() for part in parts).decode("ascii")
        return unique(json.loads(line) for line in text.splitlines())

    def score(self, records: Iterable[Record]) -> dict[str, float]:
        """Scores records without touching the state; a sample that stands twice counts once."""
        totals: Sums = {}
        for sums in self.units(unique(records)).values():
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        return {name: float(value) for name, value in self.values(totals).items()} if totals else {}

    def compute(self) -> dict[str, Tensor]:
        """Returns the scores by name over the answers of all ranks."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.score(self.records()).items()}

    def _sync_dist(self, *args: Any, **options: Any) -> None:
        if not self.answers:  # torchmetrics would send floats for a rank without answers, which are no bytes
            self.answers = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super()._sync_dist(*args, **options)


class MeanMetric(KeyedMetric):
    """A score that is the mean of one number for each sample, also by group of samples."""

    name: ClassVar[str] = "accuracy"

    @abstractmethod
    def of(self, record: Record) -> float:
        """Returns the score of one sample."""

    def groups(self, record: Record) -> list[str]:
        """Returns the groups of samples that a sample belongs to."""
        return []

    def units(self, records: Sequence[Record]) -> dict[str, Sums]:
        """Returns score and count, for all samples and for each group, by sample."""
        found = {}
        for record in records:
            value = self.of(record)
            sums = {"sum": value, "count": 1.0}
            for group in self.groups(record):
                sums |= {f"sum/{group}": value, f"count/{group}": 1.0}
            found[record["key"]] = sums
        return found

    def values(self, totals: Totals) -> dict[str, Any]:
        """Returns the mean over all samples, and by group."""
        return {
            f"{self.name}{key.removeprefix('sum')}": ratio(value, totals[key.replace("sum", "count", 1)])
            for key, value in totals.items()
            if key == "sum" or key.startswith("sum/")
        }
