"""Bad samples: each becomes a placeholder of no weight, is listed, and is counted against a budget.

A placeholder keeps the place of its sample, so that ranks stay in step and no other sample moves. The list
is `bad_samples.jsonl` in the run directory, shared by all ranks and by every start of the run; a sample that
is met again, in a later epoch or after a restart, counts once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from moextend_pl.contracts import IGNORE_INDEX, Sample, UserError

logger = logging.getLogger(__name__)

BAD_SAMPLES_FILE = "bad_samples.jsonl"
MAX_BAD_SAMPLES = 10
"""Enough to live through the odd damaged file of a large set; a systematic fault, such as shards built wrongly or a
template that does not fit, passes it within the first batches and stops the run while somebody is still watching."""

SHOWN = 20


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used.

    Attributes:
        shard: Path or address of its shard.
        key: Its name.
        reason: What is wrong with it.
    """

    shard: str
    key: str
    reason: str


@dataclass
class Placeholder(Sample):
    """Stands for a bad sample: nothing to learn, no image.

    Attributes:
        bad: What it stands for.
    """

    bad: BadSample | None = None


def placeholder(filler: Sample, bad: BadSample) -> Placeholder:
    """Returns what stands for a bad sample, made from an empty sample of the same model."""
    if not bool((filler.labels == IGNORE_INDEX).all()) or len(filler.pixel_values):
        raise ValueError("expected a filler with nothing to learn and no image")
    return Placeholder(bad.key, filler.input_ids, filler.labels, filler.pixel_values, [], bad=bad)


def bad_samples_of(samples: Iterable[Sample]) -> list[BadSample]:
    """Returns what the placeholders among some samples stand for."""
    return [sample.bad for sample in samples if isinstance(sample, Placeholder) and sample.bad is not None]


class BadSampleBook:
    """Counts and lists bad samples of a run; lives in the main process of each rank, where batches arrive in order.

    Args:
        limit: How many different samples may be bad.
        folder: Run directory; None keeps the list in memory only.
    """

    def __init__(self, limit: int = 0, folder: Path | None = None) -> None:
        if limit < 0:
            raise UserError(f"Expected `max_bad_samples` of at least 0, got {limit}.")
        self.limit = limit
        self.path = folder / BAD_SAMPLES_FILE if folder else None
        self.found: dict[tuple[str, str], BadSample] = {}

    def note(self, bad: Iterable[BadSample]) -> None:
        """Lists samples of a batch that is about to be used.

        Raises:
            UserError: If the budget is spent; with the list.
        """
        new = [sample for sample in bad if (sample.shard, sample.key) not in self.found]
        if not new:
            return
        self._read()  # what other ranks and earlier starts of the run have met
        for sample in new:
            if self.found.setdefault((sample.shard, sample.key), sample) is sample:
                self._write(sample)
                logger.warning("bad sample, left out: %s: %s: %s", sample.shard, sample.key, sample.reason)
        self._read()  # of two ranks that write at the same time, the one that reads last sees both
        if len(self.found) > self.limit:
            raise UserError(self._summary())

    def _read(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                sample = BadSample(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the last line of a process that was killed while it wrote
            self.found.setdefault((sample.shard, sample.key), sample)

    def _write(self, sample: BadSample) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(sample), ensure_ascii=False) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode("utf-8"))  # in one piece, so that lines of ranks do not mix
        finally:
            os.close(handle)

    def _summary(self) -> str:
        found = list(self.found.values())
        shown = "".join(f"\n  {bad.shard}: {bad.key}: {bad.reason}" for bad in found[:SHOWN])
        more = f"\n  ... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        place = f" All are listed in {self.path}." if self.path else ""
        return (
            f"Expected at most {self.limit} bad sample(s) (`max_bad_samples`), met {len(found)}.{place} See `python -m "
            f"moextend_pl shards check` for all of a set; mend the shards, or raise the number.{shown}{more}"
        )
