"""The ledger tells what the saved weights have seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.tiny_world import TinyWorld

from callbacks import SampleLedger, StageCheckpoint, TrainOnly


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_each_batch_is_a_line_and_a_continued_run_takes_back_what_it_trains_again(
    tiny_world: TinyWorld, make_trainer: Callable, tmp_path: Path
) -> None:
    def fit(steps: int, **options: Any) -> None:
        parts = [TrainOnly(["projector"]), StageCheckpoint(2), SampleLedger()]
        make_trainer(*parts, steps=steps, enable_checkpointing=True).fit(
            tiny_world.unbuilt(), tiny_world.datamodule(), **options
        )

    fit(5)
    first = rows(tmp_path / "run")
    data = tiny_world.datamodule(spec=tiny_world.unbuilt().sample_spec())
    data.setup("fit")
    batches = iter(data.train_dataloader())
    assert first == [{"batch": number, "keys": next(batches)["keys"]} for number in range(5)]
    (tmp_path / "run" / "ledger.jsonl").open("a").write('{"batch": 5, "ke')  # what a kill in the midst leaves
    fit(7, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)  # of step 4
    assert rows(tmp_path / "run")[:5] == first
    assert [row["batch"] for row in rows(tmp_path / "run")] == list(range(7))
    fit(2)
    assert rows(tmp_path / "run") == first[:2], "a run that starts anew keeps nothing of the one before"
