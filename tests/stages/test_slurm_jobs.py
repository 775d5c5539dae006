"""Jobs on a real SLURM, by the scripts that `python -m moextend_pl slurm` prints: each ends as if nothing had been."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.loopback_slurm import Cluster, loopback_slurm
from helpers.stages import ROOT, callback, metrics, write_stage
from helpers.tiny_world import TinyWorld

from moextend_pl import cli

# One worker of `pytest -n 2 --dist loadfile` starts the cluster.
pytestmark = pytest.mark.slow
STEPS, EVERY, PACED_FROM = 30, 4, 10
QUEUES = {
    "whole": "steady",
    "requeued": "steady",
    "out of time": "steady",
    "preempted with grace": "patient",
    "preempted without grace": "hasty",
    "on a node that fails": "fragile",
}
URGENT = "#!/bin/sh\n#SBATCH --nodes=2 --exclusive --partition=urgent\nsleep 2\n"
ENDS = "the same command continues where it stopped"


def batch_script(world: TinyWorld, run: Path, *options: str, pace: float) -> Path:
    """Returns the script, as it is printed, of a stage with a ledger."""
    config = write_stage(world, run, "language", train="text", steps=STEPS, every=EVERY, val=world.data("text", "test"))
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"] += [
        callback("SampleLedger"),
        {"class_path": "pace.Pace", "init_args": {"seconds": pace, "step": PACED_FROM}},
    ]
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    script = run.parent / f"{run.name}.sbatch"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        words = ["slurm", "--config", str(config), "--nodes", "2", *options, "--allow-class-path", "pace"]
        assert cli.main(words) == 0
    script.write_text(printed.getvalue())
    return script


def trained(run: Path) -> bool:
    """Whether a run is among its slow steps."""
    return (run / "ledger.jsonl").exists() and (run / "ledger.jsonl").read_text().count("\n") > PACED_FROM


class Jobs:
    """One job of each kind, side by side, and what befell them."""

    def __init__(self, cluster: Cluster, world: TinyWorld, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.numbers: dict[str, str] = {}
        for name, queue in QUEUES.items():
            # SLURM looks at the time twice a minute: USR1 comes between 60 and 90 seconds after the start.
            limits = ["--time", "2", "--grace", "30"] if name == "out of time" else []
            pace = {"whole": 0.0, "out of time": 5.0}.get(name, 4.0 if name.startswith("preempted") else 2.0)
            script = batch_script(world, folder / name, "--partition", queue, *limits, pace=pace)
            self.numbers[name] = cluster.submit(script)
        self.facts: dict[str, dict[str, str]] = {}

    def befall(self) -> None:
        """Does to each job what its name says, once it trains, and waits for their ends."""
        runs = {name: self.folder / name for name in QUEUES}
        waiting = {name for name in QUEUES if name not in ("whole", "out of time")}
        preempted = {"preempted with grace", "preempted without grace"}

        def all_befallen() -> bool:
            ready = {name for name in waiting if trained(runs[name])}
            if "requeued" in ready:
                self.cluster.ask("scontrol", "requeue", self.numbers["requeued"])
                waiting.discard("requeued")
            if preempted <= ready:
                (self.folder / "urgent.sbatch").write_text(URGENT)
                self.numbers["urgent"] = self.cluster.submit(self.folder / "urgent.sbatch")
                waiting.difference_update(preempted)
            if "on a node that fails" in ready:
                self.cluster.fail_node("n4")
                waiting.discard("on a node that fails")
            return not waiting

        self.cluster.wait_until(all_befallen, 600)
        with contextlib.suppress(AssertionError):  # a job that does not end fails its own test
            self.cluster.finish(list(self.numbers.values()), 600)
        self.facts = {name: self.cluster.job(number) for name, number in self.numbers.items()}

    def log(self, name: str) -> str:
        """Returns what a job has written."""
        return (self.folder / f"{name}.out").read_text()


@pytest.fixture(scope="module")
def jobs(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("slurm")
    with loopback_slurm(folder / "cluster") as cluster:
        own = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
        cluster.environment["PYTHONPATH"] = os.pathsep.join(own)
        jobs = Jobs(cluster, tiny_world, folder)
        jobs.befall()
        yield jobs


def ledger(run: Path) -> list[str]:
    return (run / "ledger.jsonl").read_text().splitlines()


def curve(run: Path) -> dict[int, list[str]]:
    return {step: [value.hex() for value in values] for step, values in metrics(run).items()}


def assert_as_if_nothing_had_happened(jobs: Jobs, name: str) -> None:
    facts: dict[str, Any] = jobs.facts[name]
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), jobs.log(name)[-3000:]
    run, whole = jobs.folder / name, jobs.folder / "whole"
    assert len(ledger(whole)) == STEPS
    assert ledger(run) == ledger(whole)
    assert curve(run) == curve(whole)
    assert (run / "stage.json").exists()


@pytest.mark.parametrize("name", ["requeued", "out of time", "preempted with grace", "preempted without grace"])
def test_row_12_a_job_that_slurm_queues_again_ends_as_if_nothing_had_happened(jobs: Jobs, name: str) -> None:
    assert jobs.facts["whole"]["Restarts"] == "0"
    assert int(jobs.facts[name]["Restarts"]) >= 1
    assert_as_if_nothing_had_happened(jobs, name)
    log = jobs.log(name)
    assert log.count(ENDS) >= 2, log[-6000:]
    assert "Traceback" not in log
    by_script = name in ("out of time", "preempted with grace")
    assert ("told to end, queued again" in log) == by_script


def test_row_13_a_job_whose_node_fails_ends_as_if_nothing_had_happened(jobs: Jobs) -> None:
    assert int(jobs.facts["on a node that fails"]["Restarts"]) >= 1, jobs.log("on a node that fails")[-6000:]
    assert_as_if_nothing_had_happened(jobs, "on a node that fails")
