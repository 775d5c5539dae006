"""What the quickstart tells a person to type next works as it is printed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moextend_pl.quickstart.next_steps import NEXT, next_commands

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_command_that_the_quickstart_ends_with_runs_as_printed(quickstart: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "quick start"  # a name that a shell would take apart
    # Stages find one another by paths beside them.
    shutil.copytree(quickstart, out, ignore=shutil.ignore_patterns("checkpoints", "exported", "shared", "report.html"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    said = {}
    for purpose, line in next_commands(out):
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said[purpose] = done.stdout
    assert said["ask it about a picture"].strip()
    assert all((out / name).exists() for name in ("report.html", "exported/config.json", "shared/delta.safetensors"))


def test_commands_are_quoted_for_a_shell(tmp_path: Path) -> None:
    lines = [line for _, line in next_commands(tmp_path / "it's here")]
    assert all(str(tmp_path / "it's here") in " ".join(shlex.split(line)) for line in lines)
    assert len(lines) == len(NEXT)
