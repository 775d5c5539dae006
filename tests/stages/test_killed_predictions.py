"""`predict` on two processes, killed and started again, answers as one process that nobody killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.stages import ROOT, callback, write_stage
from helpers.tiny_world import TinyWorld

from moextend_pl import cli

pytestmark = pytest.mark.slow
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def predict(config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moextend_pl", "predict", "--config", str(config), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = config.with_suffix(".log").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def stage_file(world: TinyWorld, run: Path) -> Path:
    config = write_stage(world, run, "align")
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"].append(callback("WritePredictions"))
    content["data"]["init_args"]["predict"] = {"words": world.data("text"), "pictures": world.data("vqa")}
    content["data"]["init_args"]["evaluation"] = {"batch_size": 2}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    return config


def test_killed_predictions_of_two_processes_go_on(tiny_world: TinyWorld, tmp_path: Path) -> None:
    one, two = (stage_file(tiny_world, tmp_path / name) for name in ("one", "two"))
    process = predict(two, *TWO)
    part = tmp_path / "two" / "predictions_pictures_rank1.jsonl.part"
    limit = time.monotonic() + 120
    while not (part.is_file() and part.read_text().count("\n") >= 3):
        assert process.poll() is None, two.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert predict(two, *TWO).wait(timeout=120) == 0, two.with_suffix(".log").read_text()[-3000:]
    cli.run(["predict", "--config", str(one)])
    assert "going on behind" in two.with_suffix(".log").read_text()
    assert not list((tmp_path / "two").glob("*.part")) + list((tmp_path / "two").glob("*.facts.json"))
    for name, count in (("words", 24), ("pictures", 48)):
        (expected,) = (tmp_path / "one").glob(f"predictions_{name}*")
        (got,) = (tmp_path / "two").glob(f"predictions_{name}*")  # no file of a process is left
        assert expected.read_text().count("\n") == count
        assert got.read_text() == expected.read_text()
