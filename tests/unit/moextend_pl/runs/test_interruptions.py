"""Starts of a job that bring no step are counted, others are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moextend_pl.contracts import UserError
from moextend_pl.runs.interruptions import RESTARTS_FILE, count_restarts, listening


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
