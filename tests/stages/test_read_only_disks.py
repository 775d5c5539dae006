"""A disk that is or becomes read-only ends a run with one sentence and nothing half-written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stages import ROOT, write_stage
from helpers.tiny_world import TinyWorld

pytestmark = pytest.mark.slow
APART = ["unshare", "--map-root-user", "--mount"]


def mounts_are_allowed() -> bool:
    try:
        return subprocess.run([*APART, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not mounts_are_allowed(), reason="needs a machine on which a user may mount")
@pytest.mark.parametrize(
    ("rows", "every", "message"),
    [
        (0, 2, "expected a run directory that can be written to at .*Read-only file system"),
        (5, 2, "cannot use .*Read-only file system"),
        (5, 100_000, r"cannot use .*metrics\.csv: Read-only file system"),
    ],
    ids=["at the start", "with checkpoints", "before a checkpoint"],
)
def test_a_run_ends_with_a_sentence_and_its_last_checkpoint_is_whole(
    tiny_world: TinyWorld, tmp_path: Path, rows: int, every: int, message: str
) -> None:
    (tmp_path / "disk").mkdir()
    config = write_stage(tiny_world, tmp_path / "disk" / "run", "align", steps=100_000, every=every)
    config = config.rename(tmp_path / "run.yaml")
    code = [sys.executable, str(ROOT / "tests" / "helpers" / "read_only_disk.py"), str(config)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    ended = subprocess.run([*APART, *code, str(tmp_path / "disk"), str(rows)], env=environment, timeout=240)
    assert ended.returncode == 2
    log = config.with_suffix(".log").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert "Traceback" not in log
    left = set((tmp_path / "left.txt").read_text().split())
    assert left - {"previous.ckpt"} == (
        {".lock", "config.yaml", "metrics.csv"} | ({"last.ckpt"} if every == 2 else set()) if rows else set()
    )
