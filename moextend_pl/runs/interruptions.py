"""What ends a run from outside: signals are noted, not died of, and starts that bring no step are counted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import read_json, write_json

EXIT_TOLD = 75  # "try again" of sysexits.h; a job script queues the job again on it
HEARD = (signal.SIGTERM, signal.SIGUSR1)
RESTARTS_FILE = "restarts.json"
RESTARTS_LIMIT = 20
LAUNCHER_ENDS = 20  # seconds


class Told(SystemExit):
    """Ends a process that was told to, or whose run was; the same command goes on."""

    def __init__(self) -> None:
        super().__init__(EXIT_TOLD)


class Notes:
    """Whether this process was told to end.

    A signal comes at any place of the code, where ranks stand at different ones; it is noted, and the run ends where
    all of them stand at the same.

    Attributes:
        told: Name of the signal; empty while there was none.
        at_once: Whether there is nobody to agree with and nothing to save, so that a signal ends the process there.
        launcher: Process that started this one and ends it where it ends first; 0 if there is none.
        listens: Whether it hears anything: not in a thread beside the main one.
    """

    def __init__(self) -> None:
        self.told = ""
        self.at_once = False
        self.launcher = 0
        self.listens = False

    def hold(self) -> None:
        """Lets signals wait, also those to processes that are started now, until `release`, or until they listen.

        A process that has just been started would die of them, and its launcher with it.
        """
        if self.listens:
            signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)

    def release(self) -> None:
        """Hears signals again, and those that have waited."""
        if self.listens:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)

    def note(self, number: int, _frame: object = None) -> None:
        """Hears a signal."""
        self.told = signal.Signals(number).name
        if self.at_once:
            raise Told

    def let_launcher_go_first(self) -> None:
        """Waits for the process that launched this one.

        Lightning kills it when one of its children ends with another code than 0, whatever it is writing.
        """
        limit = time.monotonic() + LAUNCHER_ENDS
        while self.launcher and os.getppid() == self.launcher and time.monotonic() < limit:
            time.sleep(0.05)


@contextlib.contextmanager
def listening() -> Iterator[Notes]:
    """Notes SIGTERM and SIGUSR1; in a thread that is not the main one, nothing."""
    notes, before = Notes(), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, notes.note) for number in HEARD}
        notes.listens = True
    try:
        notes.release()
        yield notes
    finally:
        notes.at_once = False
        notes.release()
        for number, handler in before.items():
            signal.signal(number, handler)


def deafen() -> None:
    """Lets a process whose work is over come to its end, with its own exit code.

    An interpreter takes a second to end. `srun --kill-on-bad-exit` sends SIGTERM to the others as soon as one has
    ended, and a job that is preempted just then may have written all it had to write.
    """
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


def restarts() -> int:
    """Returns how often SLURM has started the job of this process again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def job_mark(run: Path) -> dict[str, Any]:
    """Returns what an earlier start of the same job wrote into a run; nothing if none came so far.

    What a command says of its beginning, `--fresh` or `--ckpt_path`, was done by that start and is not done again.
    """
    mark = read_json(run / RESTARTS_FILE) if restarts() else {}
    # The first rank of this start may have written already.
    is_earlier = mark.get("job") == os.environ.get("SLURM_JOB_ID") and mark.get("first", restarts()) < restarts()
    return mark if is_earlier else {}


def count_restarts(run: Path, step: int) -> None:
    """Counts how often SLURM started a job again without a step having been taken since, and marks its run.

    Args:
        run: Run directory; the first rank counts.
        step: Of the checkpoint that the run goes on from; 0 without one.

    Raises:
        UserError: If that is too often: the job would be queued again for ever. Or if the limit is no number.
    """
    job, path, before = os.environ.get("SLURM_JOB_ID"), run / RESTARTS_FILE, job_mark(run)
    if job is None:
        return  # nobody starts it again by himself
    limit = os.environ.get("MAX_RESTARTS", str(RESTARTS_LIMIT))
    if not limit.isdecimal():
        raise UserError(f"Expected a whole number of at least 0 as MAX_RESTARTS, got {limit!r}. Correct it.")
    times = int(before.get("times", 0)) + 1 if before.get("step") == step else 0
    if times > int(limit):
        path.unlink(missing_ok=True)
        raise UserError(
            f"expected a job that takes steps, got {times} starts one after another that ended at step {step}. Give it "
            "more time (`--time`), or look at the log for what ends it; MAX_RESTARTS sets another number."
        )
    first, since = before.get("first", restarts()), before.get("since", time.time())
    write_json(path, {"job": job, "first": first, "since": since, "step": step, "times": times})
