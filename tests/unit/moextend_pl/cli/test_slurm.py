"""Batch scripts that are filled in: what sbatch reads of them, and what they run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.cli_runs import error_of

from moextend_pl import cli
from moextend_pl.cli.slurm import TEMPLATE


def directives(text: str) -> dict[str, str]:
    """What sbatch reads: lines before the first command; the last one of a name wins."""
    head = text.split("\nset -uo")[0]
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.MULTILINE))


def runs(text: str, folder: Path, *arguments: str) -> list[str]:
    """The words that the script gives to srun."""
    (folder / "job.sbatch").write_text(text)
    stand_in = folder / "srun"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {shlex.quote(str(folder))}/words\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"SLURM_NTASKS_PER_NODE": "4", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_PER_TASK": "6"}
    subprocess.run(["bash", str(folder / "job.sbatch"), *arguments], env=environment, cwd=folder, check=True)
    return (folder / "words").read_text().splitlines()


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["slurm", *options]) == 0
    return capsys.readouterr().out


def test_options_stand_where_sbatch_reads_them_and_others_go_to_fit(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path
) -> None:
    own = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1-12:00:00", "--partition", "a100", "--grace", "300"]
    text = printed(capsys, "--config", str(stage), *own, "--trainer.max_steps=9", "--model.name", "two words")
    found = directives(text)
    assert found["nodes"] == "2"
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "4"
    assert (found["time"], found["partition"], found["signal"]) == ("1-12:00:00", "a100", "USR1@300")
    assert found["cpus-per-task"] == directives(TEMPLATE.read_text())["cpus-per-task"]
    words = runs(text, tmp_path)
    assert words[words.index("--config") + 1] == str(stage)
    assert words[-3:] == ["--trainer.max_steps=9", "--model.name", "two words"]
    assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=6"]
    assert words[words.index("--trainer.devices") + 1] == "4"
    assert words[words.index("--trainer.num_nodes") + 1] == "2"


def test_arguments_of_sbatch_win_over_what_was_filled_in(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path
) -> None:
    words = runs(printed(capsys, "--config", str(stage)), tmp_path, "other.yaml")
    assert words[words.index("--config") + 1] == "other.yaml"


def test_seeds_are_an_array_of_runs_in_folders_of_their_own(
    capsys: pytest.CaptureFixture[str], stage: Path, tmp_path: Path
) -> None:
    text = printed(capsys, "--config", str(stage), "--seeds", "3", "5", "--out", "my runs")
    assert directives(text)["array"] == "3,5"
    assert directives(text)["output"] == "slurm-%A_%a.out"
    assert runs(text, tmp_path)[-4:] == ["--seed_everything", "5", "--trainer.default_root_dir", "my runs/seed_5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "2"], "expected `--config`"),
        (["--config", "{}", "--nodes", "0"], "`--nodes` of at least 1, got 0"),
        (["--config", "{}", "--nodes", "two"], "invalid int value"),
        (["--config", "{}", "--gpus-per-node", "-1"], "`--gpus-per-node` of at least 0"),
        (["--config", "{}", "--time", "4h"], "for example 04:00:00"),
        (["--config", "{}", "--partition", "a\n#SBATCH --x"], "expected a name as `--partition`"),
        (["--config", "{}", "--seeds", "1"], "`--seeds` and `--out` together"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], stage: Path, options: list[str], message: str
) -> None:
    assert message in error_of(capsys, ["slurm", *(word.replace("{}", str(stage)) for word in options)])
