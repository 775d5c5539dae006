"""What a model answers to a whole set, written as it comes, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from moextend_pl.contracts import UserError, run_directory
from moextend_pl.inference.spec import GenerationSpec
from moextend_pl.models.delta import delta_tensors
from moextend_pl.models.moextend import MoExtend
from moextend_pl.runs.atomic import read_json, write_atomically, write_json, write_text
from moextend_pl.runs.fingerprints import fingerprints
from moextend_pl.runs.sources import DECIDE_ANSWERS, differences, flatten, plain, told
from moextend_pl.training.losses import sum_over_ranks

log = logging.getLogger(__name__)

PART, TEST_PART, FACTS = ".part", ".test.part", ".facts.json"
"""Endings of a file that is being written, and of what its answers were made from."""


class WritePredictions(Callback):
    """Writes each generated answer of test and predict runs to `predictions_<set>.jsonl`.

    Answers are written batch by batch, to `predictions_<set>.jsonl.part` until all sets are done. A predict run that
    finds such a file goes on behind its last batch, if model, data and options are those that it was begun with. A test
    begins anew, since its score is of all answers.

    Several processes write a file each, of which the first one makes one when all are done: in the order of the set,
    every sample once, as one process writes it.
    """

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: MoExtend, stage: str) -> None:
        """Declares behind which batch each set of a predict run goes on."""
        self._done = {}
        data: Any = getattr(trainer, "datamodule", None)
        limit = trainer.limit_predict_batches
        every = isinstance(limit, float) and limit == 1.0  # the whole number 1 is one batch
        if stage != "predict" or not hasattr(data, "go_on_from") or not every:
            return
        share = data.eval_batch_size // trainer.world_size
        for name in data.predict_names:
            rows = min(_rows(_path(trainer, name, rank, PART)) for rank in range(trainer.world_size))
            self._done[name] = data.go_on_from(name, rows // share) * share

    def on_test_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Forgets what an earlier test wrote before it was killed."""
        for name in _names(trainer, "test"):
            _path(trainer, name, trainer.global_rank, TEST_PART).unlink(missing_ok=True)

    def on_predict_start(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Sees that the answers that are there and those that come are of one making.

        Raises:
            UserError: If they are not.
        """
        data: Any = getattr(trainer, "datamodule", None)
        weights = _weights(pl_module) if self._done else ""
        for name in set(_names(trainer, "predict")) - self._done.keys():
            _path(trainer, name, trainer.global_rank, PART).unlink(missing_ok=True)
        for name, done in self._done.items():
            part = _path(trainer, name, trainer.global_rank, PART)
            begun = any(_rows(_path(trainer, name, rank, PART)) for rank in range(trainer.world_size))
            facts = plain({**_facts(pl_module), "weights": weights, "data": data.predict_facts(name)})
            place = run_directory(trainer) / f"predictions_{name}{FACTS}"
            if begun and (other := differences(flatten(read_json(place)), flatten(facts))):
                raise UserError(
                    f"{part} is the beginning of predictions that were made from something else: {told(other)}. "
                    "Restore that, or remove the file to begin anew."
                )
            if done:
                log.info("%s: going on behind %d answers", part, done)
            _keep(part, done)
            if trainer.is_global_zero:
                write_json(place, facts)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: MoExtend, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Writes the rows of a batch."""
        _append(trainer, _names(trainer, "test")[dataloader_idx], TEST_PART, outputs["rows"])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: MoExtend, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Writes the rows of a batch."""
        _append(trainer, _names(trainer, "predict")[dataloader_idx], PART, outputs)

    def on_test_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Gives the files their names."""
        _finish(trainer, pl_module, _names(trainer, "test"), TEST_PART)

    def on_predict_end(self, trainer: Trainer, pl_module: MoExtend) -> None:
        """Gives the files their names."""
        names = _names(trainer, "predict")
        _finish(trainer, pl_module, names, PART)
        for name in names if trainer.is_global_zero else ():
            (run_directory(trainer) / f"predictions_{name}{FACTS}").unlink(missing_ok=True)


def _names(trainer: Trainer, stage: str) -> list[str]:
    """Returns the names of the sets, numbers where the data has none."""
    named = getattr(getattr(trainer, "datamodule", None), f"{stage}_names", ())
    return list(named or map(str, range(len(getattr(trainer, f"num_{stage}_batches")))))


def _path(trainer: Trainer, name: str, rank: int, ending: str = "") -> Path:
    suffix = f"_rank{rank}" if trainer.world_size > 1 else ""
    return run_directory(trainer) / f"predictions_{name}{suffix}.jsonl{ending}"


def _rows(path: Path) -> int:
    """Returns how many whole lines a file has."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _keep(path: Path, rows: int) -> None:
    """Leaves only the first lines of a file, and removes it where none is left."""
    if not rows:
        path.unlink(missing_ok=True)
    elif path.is_file():
        lines = path.read_bytes().splitlines(keepends=True)[:rows]
        write_atomically(path, lambda place: place.write_bytes(b"".join(lines)))


def _append(trainer: Trainer, name: str, ending: str, rows: Sequence[dict[str, Any]]) -> None:
    path = _path(trainer, name, trainer.global_rank, ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def _finish(trainer: Trainer, module: MoExtend, names: Sequence[str], part_ending: str) -> None:
    """Gives files their names, and joins those of several processes."""
    for name in names:
        path, part = (_path(trainer, name, trainer.global_rank, ending) for ending in ("", part_ending))
        rows = _rows(part)
        if part.is_file():
            part.replace(path)
        total = int(sum_over_ranks(torch.tensor(rows, device=module.device)))
        if trainer.world_size > 1 and trainer.is_global_zero:
            path = _join(trainer, name, total)
        if trainer.is_global_zero:
            log.info("%d predictions in %s", total, path)
    trainer.strategy.barrier()


def _join(trainer: Trainer, name: str, total: int) -> Path:
    """Makes one file of those of all ranks, each of which answered its share of every batch.

    Returns:
        The file; where the files of other ranks cannot be seen from here, that of this one, and all stay.
    """
    places = [_path(trainer, name, rank) for rank in range(trainer.world_size)]
    batch = getattr(getattr(trainer, "datamodule", None), "eval_batch_size", 0)
    found = [path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else [] for path in places]
    if not batch or sum(map(len, found)) != total:
        log.warning("%s: the answers of %d processes stay in files of their own", places[0], trainer.world_size)
        return places[0]
    share = batch // trainer.world_size
    starts = range(0, max(map(len, found)), share)
    text = "".join(line for start in starts for lines in found for line in lines[start : start + share])
    whole = run_directory(trainer) / f"predictions_{name}.jsonl"
    write_text(whole, text)
    for path in places:
        path.unlink(missing_ok=True)
    return whole


def _facts(module: MoExtend) -> dict[str, Any]:
    """Returns what beside weights and data decides an answer."""
    sources, spec = module.sources(), getattr(module, "generation", None)
    how = asdict(spec) if isinstance(spec, GenerationSpec) else {}
    return {**{section: sources.get(section, {}) for section in DECIDE_ANSWERS}, "generation": how}


def _weights(module: MoExtend) -> str:
    """Returns a digest of all that the files of the base do not hold."""
    tensors = delta_tensors(module) if isinstance(module, MoExtend) else module.state_dict()
    return hashlib.sha256(json.dumps(fingerprints(tensors), sort_keys=True).encode()).hexdigest()[:16]
