"""Starts of a job that bring no step are counted, others are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.runs.interruptions import RESTARTS_FILE, Heartbeat, Heartbeats, count_restarts, listening, waited_for


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAX_RESTARTS", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "1")

    def start(*steps: int, requeued: bool = True) -> None:
        for step in steps:
            count = 0 if not requeued else int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
            count_restarts(tmp_path, step)

    return start


def test_healthy_requeues_are_never_too_many(starts) -> None:
    starts(0, requeued=False)
    starts(*range(1, 100))


def test_starts_without_a_step_are_too_many_in_the_end(starts) -> None:
    starts(0, requeued=False)
    starts(0, 0, 5, 5, 5, 5)
    with pytest.raises(UserError, match=r"got 4 starts one after another that ended at step 5\. .*--time"):
        starts(5)


@pytest.mark.parametrize("again", [True, False], ids=["queued again", "submitted anew"])
def test_a_count_begins_anew_after_the_end_and_where_a_person_starts_the_job(
    starts, tmp_path: Path, again: bool
) -> None:
    starts(5, requeued=False)
    starts(5, 5, 5)
    if again:
        with pytest.raises(UserError):
            starts(5)
    starts(5, requeued=again)
    starts(5, 5, 5)


def test_a_limit_that_is_no_number_is_told(starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_RESTARTS", "none")
    with pytest.raises(UserError, match="as MAX_RESTARTS, got 'none'"):
        starts(5)


def test_a_damaged_count_is_none(starts, tmp_path: Path) -> None:
    (tmp_path / RESTARTS_FILE).write_text("{")
    starts(5, 5, 5)


def test_a_process_that_is_told_before_it_listens_hears_it_when_it_does() -> None:
    code = (
        "import time; time.sleep(0.3)\n"
        "from moextend_pl.runs.interruptions import listening\n"
        "with listening() as notes:\n    print(notes.told)\n"
    )
    with listening() as notes:
        notes.hold()
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        child.send_signal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        notes.release()
        limit = time.monotonic() + 10
        while not notes.told and time.monotonic() < limit:  # a thread beside this one may get it, when its turn comes
            time.sleep(0.01)
        assert notes.told == "SIGUSR1"
    assert child.communicate(timeout=60)[0].strip() == "SIGTERM"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGUSR1}


def test_a_process_whose_command_is_over_ends_with_its_own_exit_code_whatever_it_is_told() -> None:
    code = (
        "import atexit, os, runpy, signal, sys\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "sys.argv[1:] = ['no-command']\n"
        "runpy.run_module('moextend_pl', run_name='__main__')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 2


SILENT = 3
"""How often a rank had told where it stands that says nothing more."""


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({1: Heartbeat(7, 0, "was in step 7", 9), 2: Heartbeat(7, 0, "was in step 7", 8)}, "All ranks stand there. "),
        (
            {1: Heartbeat(7, 0, "was in step 7", SILENT), 2: Heartbeat()},
            "No sign of life from rank 1 (it was in step 7), rank 2 (nothing is known of it). ",
        ),
        (
            {1: Heartbeat(6, 9, "waited for the next batch after step 6", 8), 2: Heartbeat(7, 1, "is on", 9)},
            "The others wait for rank 1 (it waited for the next batch after step 6). ",
        ),
        ({1: Heartbeat(7, 1, "wrote a checkpoint of step 7", 9)}, "The others wait for rank 0 (it was in step 7). "),
        (
            dict.fromkeys(range(1, 12), Heartbeat()),
            f"No sign of life from {', '.join(f'rank {n} (nothing is known of it)' for n in range(1, 9))} and 3 more. ",
        ),
    ],
    ids=["nobody", "two that are silent", "one that is behind", "the one that asks", "many"],
)
def test_ranks_that_say_nothing_are_named_else_those_that_are_behind(others: dict[int, Heartbeat], told: str) -> None:
    after = {0: Heartbeat(7, 0, "was in step 7", 10), **others}
    still = {SILENT, 0}
    before = {rank: replace(beat, told=beat.told - (beat.told not in still)) for rank, beat in after.items()}
    assert waited_for(before, after) == told


def test_ranks_hear_of_each_other_by_files_and_leave_none(tmp_path: Path) -> None:
    one, two = (Heartbeats(tmp_path, rank, 2) for rank in (0, 1))
    ahead, behind = Heartbeat(3, 1, "was in step 3"), Heartbeat(3, 0, "waited for the next batch after step 3")
    over = threading.Event()

    def talk() -> None:
        while not over.wait(0.05):
            one.tell(ahead)

    talks = threading.Thread(target=talk)
    talks.start()
    assert two.suspects(behind, 0.5) == "The others wait for rank 1 (it waited for the next batch after step 3). "
    assert "No sign of life from rank 1 (nothing is known of it)" in one.suspects(ahead, 0.5)
    two.tell(behind)
    assert "No sign of life from rank 1 (it waited for the next batch after step 3)" in one.suspects(ahead, 0.5)
    over.set()
    talks.join()
    one.end()
    two.end()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_write_or_read_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    beats = Heartbeats(tmp_path / "file", 0, 2)
    beats.tell(Heartbeat())
    beats.end()
    monkeypatch.setattr("moextend_pl.runs.interruptions.OTHERS_SAY", 0.1)
    monkeypatch.setattr("moextend_pl.runs.interruptions.read_json", lambda _: time.sleep(0.3) or {})
    assert "Where other ranks stand could not be read in" in beats.suspects(Heartbeat(), 0.1)
