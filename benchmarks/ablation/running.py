"""Runs what is left of a plan, a few processes at a time, each on one core."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ablation.planning import ROOT, Plan, Run
from ablation.work import MEASURES
from moextend_pl.runs.atomic import write_json, write_text

STATE = "run.json"
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
Outcome = dict[str, Any]


def read_outcome(out: Path, run: Run) -> Outcome | None:
    """Returns what is known of a finished run, None if it has to be run (again).

    Args:
        out: Folder of the study.
        run: The run; an outcome of other settings, or of other runs before it, does not count.
    """
    path = state_path(out, run)
    if not path.is_file():
        return None
    outcome: Outcome = json.loads(path.read_text(encoding="utf-8"))
    return outcome if outcome["digest"] == run.digest and outcome["status"] == DONE else None


def state_path(out: Path, run: Run) -> Path:
    """Returns where the outcome of a run is kept: beside its folder, which belongs to the stage alone."""
    return out / f"{run.name}.{STATE}"


def execute(out: Path, run: Run, configs: Path) -> Outcome:
    """Runs one run to its end and writes its outcome.

    Args:
        out: Folder of the study.
        run: The run; files of an earlier one with other settings are removed.
        configs: Folder of the stage files.

    Returns:
        Status, seconds, measures of a measured run, and the last words of a failed one.
    """
    folder, state = out / run.name, state_path(out, run)
    old = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    if folder.exists() and old.get("digest") != run.digest:
        shutil.rmtree(folder)
    write_json(state, {"digest": run.digest, "status": "started"})
    config = configs / f"{run.name.replace('/', '-')}.yaml"
    write_text(config, run.config)
    kind = "data" if run.stage == "data" else "fit"
    command = [sys.executable, "-m", "ablation.work", kind, str(config), *(["measure"] if run.measured else [])]
    log = out / f"{run.name}.log"
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, env=_environment(), stdout=stream, stderr=subprocess.STDOUT).returncode
    outcome: Outcome = {"digest": run.digest, "status": DONE, "seconds": round(time.monotonic() - begin, 1)}
    if code:
        outcome |= {"status": FAILED, "error": last_words(log)}
    elif run.measured:
        receipt = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        outcome["training_seconds"] = receipt["seconds"]
        outcome["measures"] = json.loads((folder / MEASURES).read_text(encoding="utf-8"))
    write_json(state, outcome)
    return outcome


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **ONE_CORE, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def last_words(log: Path) -> str:
    """Returns the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n")]
    return next((line for line in reversed(lines) if line), "no output")


class Clock:
    """Guesses how long the runs that are left take, from those that are done.

    Args:
        usual: Usual seconds of each stage.
        jobs: Runs at once.
    """

    def __init__(self, usual: Mapping[str, float], jobs: int) -> None:
        self.usual, self.jobs = usual, jobs
        self.took = self.expected = 0.0

    def add(self, run: Run, seconds: float) -> None:
        """Notes that a run took this long."""
        self.took += seconds
        self.expected += self.usual.get(run.stage, 60.0)

    def left(self, runs: list[Run]) -> float:
        """Returns the seconds that these runs will take."""
        pace = self.took / self.expected if self.expected else 1.0
        return pace * sum(self.usual.get(run.stage, 60.0) for run in runs) / self.jobs


def run_all(
    plan: Plan, out: Path, configs: Path, jobs: int, clock: Clock, do: Callable[[Path, Run, Path], Outcome] = execute
) -> dict[str, Outcome]:
    """Runs what is not finished yet, each run after those that it reads from; a failed run is no error.

    Args:
        plan: The plan.
        out: Folder of the study.
        configs: Folder of the stage files.
        jobs: Runs at once.
        clock: Guesses the time left.
        do: Runs one run.

    Returns:
        Name -> outcome of every run.
    """
    known = {name: outcome for name, run in plan.runs.items() if (outcome := read_outcome(out, run)) is not None}
    if known:
        print(f"{len(known)} of {len(plan.runs)} runs are there already", flush=True)
    waiting = [run for name, run in plan.runs.items() if name not in known]
    busy: dict[Future[Outcome], Run] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or busy:
            for run in list(waiting):
                states = [known[name]["status"] for name in run.after if name in known]
                if any(state != DONE for state in states):
                    known[run.name] = {"status": SKIPPED, "error": "a run before it failed"}
                    waiting.remove(run)
                elif len(states) == len(run.after) and len(busy) < jobs:
                    busy[pool.submit(do, out, run, configs)] = run
                    waiting.remove(run)
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                run = busy.pop(future)
                known[run.name] = future.result()
                clock.add(run, known[run.name].get("seconds", 0.0))
                left = clock.left([*waiting, *busy.values()])
                print(_line(run, known[run.name], len(known), len(plan.runs), left), flush=True)
    return known


def _line(run: Run, outcome: Outcome, done: int, total: int, left: float) -> str:
    words = outcome["status"] if outcome["status"] != DONE else f"{outcome['seconds']:.0f} s"
    measures = outcome.get("measures", {})
    told = "".join(f", {name} {measures[name]:.3f}" for name in ("vqa", "text") if name in measures)
    error = f": {outcome['error']}" if "error" in outcome else ""
    return f"[{done}/{total}] {run.name}: {words}{told}{error}  (about {left / 60:.0f} min left)"
