"""Told to end at a moment that nobody chose, two processes end together; `make faults` tries more of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers.stages import ROOT, end, launched_by, metrics, start, wait_for_ends, write_stage
from helpers.tiny_world import TinyWorld

pytestmark = pytest.mark.slow
TRIALS = int(os.environ.get("MOEXTEND_TRIALS", "2"))
OPTIONS = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--allow-class-path", "last_step")


def stage_file(world: TinyWorld, run: Path) -> Path:
    """A stage that does not end, with a validation now and then."""
    config = write_stage(world, run, "align", steps=100_000, every=100_000)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["val_check_interval"] = 20
    content["trainer"]["callbacks"].append({"class_path": "last_step.LastStep"})
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return config


def wait_until(process: subprocess.Popen[str], config: Path, ready: Callable[[], bool]) -> None:
    limit = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, config.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < limit
        time.sleep(0.02)


def hears(pid: int) -> bool:
    """Whether a process has got as far as its first lines, which are there to hear."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def start_and_wait(world: TinyWorld, run: Path, trial: int, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[str]:
    """Starts a stage and returns at a random moment of its first ten seconds, from the first on, or of its training."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "helpers"))
    config, chance = stage_file(world, run), random.Random(trial)
    process, begun = start(config, *OPTIONS), time.monotonic()
    if trial % 2:
        wait_until(process, config, lambda: (run / "metrics.csv").exists())
        begun, moment = time.monotonic(), chance.uniform(0, 4)
    else:
        wait_until(process, config, lambda: hears(process.pid))
        moment = chance.uniform(1, 10)
    wait_until(process, config, lambda: time.monotonic() > begun + moment)
    return process


def assert_ended_together(process: subprocess.Popen[str], ranks: list[int], run: Path) -> None:
    log = run.parent / f"{run.name}.log"
    try:
        assert process.wait(180) == 75, log.read_text()[-3000:]
        wait_for_ends(ranks, 30)
    finally:
        if process.poll() is None:
            end(process)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    steps = {path.name: int(path.read_text()) for path in run.glob("rank_*.txt")}
    last = run / "checkpoints" / "last.ckpt"
    assert last.exists() == bool(steps)
    if steps:
        saved = torch.load(last, weights_only=True)["global_step"]
        assert steps == {"rank_0.txt": saved, "rank_1.txt": saved}
        assert list(metrics(run)) == list(range(saved))


@pytest.mark.parametrize("trial", range(TRIALS))
def test_row_9_all_are_told_by_usr1_at_a_random_moment(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: int
) -> None:
    process = start_and_wait(tiny_world, tmp_path / "run", trial, monkeypatch)
    ranks = launched_by(process)
    os.killpg(process.pid, signal.SIGUSR1)
    assert_ended_together(process, ranks, tmp_path / "run")


@pytest.mark.skipif(TRIALS < 4, reason="moments that are chosen are tried in test_two_processes.py")
@pytest.mark.parametrize("trial", range(TRIALS // 2))
def test_row_10_each_rank_in_turn_is_told_by_sigterm_at_a_random_moment(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: int
) -> None:
    process = start_and_wait(tiny_world, tmp_path / "run", 2 + trial // 2, monkeypatch)
    ranks = [process.pid, *launched_by(process)]
    os.kill(ranks[-1 if trial % 2 == 0 else 0], signal.SIGTERM)
    assert_ended_together(process, ranks[1:], tmp_path / "run")
