"""Every YAML file parses, its layers exist, and the classes it names belong to allowed packages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from source import ROOT

from moextend_pl.cli.config_files import prepare_arguments

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
BATCH_SCRIPTS = sorted((ROOT / "configs" / "slurm").glob("*.sbatch"))


def test_discovery_finds_configs_and_batch_scripts() -> None:
    assert len(CONFIGS) > 1
    assert len(BATCH_SCRIPTS) > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_parses_with_its_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = prepare_arguments(["fit", "--config", str(path)])
    assert arguments.files[-1] == path


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (143, False), (75, True), (138, True)]
)
@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda path: path.name)
def test_batch_script_requeues_only_when_its_time_is_up(
    script: Path, code: int, requeued: bool, tmp_path: Path
) -> None:
    # Stand-ins for the scheduler's commands: they write down how they were called.
    for name, status in (("srun", code), ("scontrol", 0)):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\nexit {status}\n')
        command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(["bash", script, "a.yaml", "--trainer.max_steps=3"], env=environment, cwd=tmp_path)
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == code
    assert "python -m moextend_pl fit --config a.yaml --trainer.num_nodes 2" in calls
    assert calls.splitlines()[0].endswith("--trainer.max_steps=3")
    assert ("scontrol requeue 7" in calls) == requeued
