"""A stage that is killed at any moment and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.stages import kill_when, metrics, start, write_stage
from helpers.tiny_world import TinyWorld, make_plan
from safetensors.torch import load_file

from moextend_pl import cli
from moextend_pl.runs.preflight import CHECKPOINT_FOLDER, LAST_CHECKPOINT

STEPS = {"extend": 40, "probe": 20, "instruction": 40}
RESULTS = {
    "extend": ["delta.safetensors"],
    "instruction": ["delta.safetensors"],
    "probe": ["extension_plan.yaml", "usage.json"],
}


def checkpoint(run: Path) -> Path:
    return run / CHECKPOINT_FOLDER / LAST_CHECKPOINT


def is_configured(run: Path) -> bool:
    return (run / "config.yaml").exists()


def has_moved_past_a_checkpoint(run: Path) -> bool:
    # Four rows after the step of the first checkpoint, which is the sixth.
    return checkpoint(run).exists() and len((run / "metrics.csv").read_text().splitlines()) > 10


def has_first_result(stage: str) -> Callable[[Path], bool]:
    return lambda run: (run / RESULTS[stage][0]).exists()


def stage_file(world: TinyWorld, folder: Path, run: str, stage: str) -> Path:
    plan = folder / "plan.yaml"
    make_plan(sources=(1, 2)).save(plan)
    return write_stage(world, folder / run, stage, plan=plan, steps=STEPS[stage], every=6)


@pytest.fixture(scope="module")
def whole(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of each stage that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")

    def run(stage: str) -> Path:
        if not (folder / stage / "stage.json").exists():
            cli.run(["fit", "--config", str(stage_file(tiny_world, folder, stage, stage))])
        return folder / stage

    return run


CASES = [
    pytest.param("extend", has_moved_past_a_checkpoint, id="extend after a checkpoint"),
    pytest.param("extend", is_configured, id="extend before a checkpoint", marks=pytest.mark.slow),
    pytest.param("extend", has_first_result("extend"), id="extend while it writes its results", marks=pytest.mark.slow),
    pytest.param("probe", has_moved_past_a_checkpoint, id="probe after a checkpoint", marks=pytest.mark.slow),
    pytest.param("instruction", has_moved_past_a_checkpoint, id="upcycled after a checkpoint", marks=pytest.mark.slow),
    pytest.param("probe", has_first_result("probe"), id="probe while it writes its results", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "moment"), CASES)
def test_killed_stage_ends_as_if_nothing_had_happened(
    tiny_world: TinyWorld, tmp_path: Path, whole: Callable[[str], Path], stage: str, moment: Callable[[Path], bool]
) -> None:
    config, run = stage_file(tiny_world, tmp_path, "run", stage), tmp_path / "run"
    kill_when(config, lambda: moment(run))
    if moment is has_moved_past_a_checkpoint:
        assert not (run / "stage.json").exists(), "the stage was over before it was killed"
        saved = torch.load(checkpoint(run), weights_only=False)["global_step"]
        assert 0 < saved < STEPS[stage]
    # What a kill in the midst of writing leaves, which no moment above is sure to hit.
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / ".last.ckpt.1.tmp").write_bytes(b"half")
    cli.run(["fit", "--config", str(config)])
    expected = whole(stage)
    for name in RESULTS[stage]:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert metrics(run) == metrics(expected)
    assert list(metrics(run)) == list(range(STEPS[stage]))
    receipts = [json.loads((folder / "stage.json").read_text()) for folder in (run, expected)]
    assert receipts[0]["steps"] == receipts[1]["steps"] == STEPS[stage]
    assert not list(run.rglob("*.tmp"))


def test_uninterrupted_extension_learned_something(whole: Callable[[str], Path]) -> None:
    delta = load_file(whole("extend") / "delta.safetensors")
    assert any(name.endswith("calibration.out_proj") and tensor.any() for name, tensor in delta.items())
    assert all(tensor.isfinite().all() for tensor in delta.values())


def test_finished_stage_that_is_started_again_changes_nothing(
    tiny_world: TinyWorld, whole: Callable[[str], Path]
) -> None:
    run = whole("extend")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    cli.run(["fit", "--config", str(run.parent / "extend.yaml")])
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_interrupted_from_the_keyboard_it_says_so_and_goes_on_when_started_again(
    tiny_world: TinyWorld, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    config, run = stage_file(tiny_world, tmp_path, "run", "extend"), tmp_path / "run"
    process = start(config)
    limit = time.monotonic() + 120
    while not has_moved_past_a_checkpoint(run):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the same command continues where it stopped" in config.with_suffix(".log").read_text()
    cli.run(["fit", "--config", str(config)])
    assert (run / "delta.safetensors").read_bytes() == (whole("extend") / "delta.safetensors").read_bytes()
