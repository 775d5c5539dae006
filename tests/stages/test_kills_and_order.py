"""What is trained on, and in which order, is the same whatever happens: kills, other workers, other ranks.

Fault rows 15 (world size), 16 (workers) and 17 (uneven shards) of the reliability notes, under SIGKILL.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.stages import callback, finish, kill_when, metrics, write_stage
from helpers.tiny_world import TinyWorld, text_entry

from datamodules.scan import build_index
from datamodules.shards import write_shards
from moextend_pl import cli

pytestmark = pytest.mark.slow
PLANS = {
    "plain": {},
    "packed mixture": {
        "rows": {"packing": True, "max_length": 40},
        "batch_size": 2,
        "train": [{"path": "text", "weight": 2.0}, {"path": "vqa", "weight": 1.0}],
    },
}
UNEVEN = (1, 50, 3, 17, 8, 29, 12)


def stage_file(world: TinyWorld, run: Path, steps: int, **data: Any) -> Path:
    """A language stage with a ledger; paths of sets are names of the tiny world."""
    config = write_stage(world, run, "language", train="text", steps=steps, every=3, val=world.data("text", "test"))
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"].insert(0, callback("SampleLedger"))
    if isinstance(data.get("train"), list):
        # Texts only: the language model alone knows no images.
        data["train"] = [
            {**one, "path": world.data("text", "test" if n else "train")} for n, one in enumerate(data["train"])
        ]
    content["data"]["init_args"].update(data)
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return config


def ledger(run: Path) -> list[dict[str, Any]]:
    """The lines that are whole; a kill may have cut the last one."""
    path = run / "ledger.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def has_trained(run: Path, batches: int) -> Callable[[], bool]:
    return lambda: len(ledger(run)) >= batches and (run / "checkpoints" / "last.ckpt").exists()


def start_options(ranks: int, workers: int) -> list[str]:
    options = ["--data.init_args.reading.num_workers", str(workers)]
    return [*options, "--trainer.devices", str(ranks), "--trainer.strategy", "ddp"] if ranks > 1 else options


CHAINS = [
    pytest.param("plain", [(1, 0), (1, 2), (1, 1)], id="workers 0, 2, 1"),
    pytest.param("packed mixture", [(2, 1), (1, 2), (2, 0)], id="packed mixture, ranks 2, 1, 2"),
]


@pytest.mark.parametrize(("plan", "starts"), CHAINS)
def test_rows_15_and_16_a_run_killed_again_and_again_trains_on_what_an_uninterrupted_one_does(
    tiny_world: TinyWorld, tmp_path: Path, plan: str, starts: list[tuple[int, int]]
) -> None:
    """Each start is (ranks, workers); all but the last are killed, at no particular point of a step."""
    steps = 20 * len(starts)
    cli.run(["fit", "--config", str(stage_file(tiny_world, tmp_path / "whole", steps, **PLANS[plan]))])
    run = tmp_path / "run"
    config = stage_file(tiny_world, run, steps, **PLANS[plan])
    for number, (ranks, workers) in enumerate(starts[:-1]):
        kill_when(config, has_trained(run, 20 * number + 11), *start_options(ranks, workers))
        assert len(ledger(run)) < steps, "it was over before it was killed"
    finish(config, *start_options(*starts[-1]))
    assert ledger(run) == ledger(tmp_path / "whole")
    assert [row["batch"] for row in ledger(run)] == list(range(steps))
    assert list(metrics(run)) == list(range(steps))
    if all(ranks == 1 for ranks, _ in starts):
        assert metrics(run) == metrics(tmp_path / "whole")


def uneven_shards(folder: Path) -> None:
    """Seven shards of 1 to 50 texts."""
    folder.mkdir()
    first = 0
    for number, size in enumerate(UNEVEN):
        part = folder.parent / f"part{number}"
        part.mkdir()
        write_shards([text_entry(first + n) for n in range(size)], part)
        (part / "00000.tar").replace(folder / f"{number:05d}.tar")
        first += size
    build_index(folder)


def test_row_17_uneven_shards_are_seen_once_on_two_ranks_in_training_and_validation(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    uneven_shards(tmp_path / "uneven")
    sets = {name: str(tmp_path / "uneven") for name in ("train", "val")}
    data = {**sets, "batch_size": 8, "evaluation": {"batch_size": 14}}
    one, two = (stage_file(tiny_world, tmp_path / name, sum(UNEVEN) // 8, **data) for name in ("one", "two"))
    for config in (one, two):
        content = yaml.safe_load(config.read_text())
        content["trainer"]["limit_val_batches"] = 1.0
        config.write_text(yaml.safe_dump(content, sort_keys=False))
    cli.run(["fit", "--config", str(one)])
    finish(two, *start_options(ranks=2, workers=1))
    keys = [key for row in ledger(tmp_path / "two") for key in row["keys"]]
    assert len(keys) == len(set(keys)) == sum(UNEVEN)
    assert ledger(tmp_path / "two") == ledger(tmp_path / "one")
    assert validation(tmp_path / "two") == pytest.approx(validation(tmp_path / "one"), rel=1e-3)


def validation(run: Path) -> list[float]:
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    columns = [header.index(name) for name in ("val/loss", "val/token_accuracy")]
    found = [[row[column] for column in columns] for row in rows if row[columns[0]]]
    assert len(found) == 1
    return [float(value) for value in found[0]]
