"""What ends a run from outside: signals are noted, starts that bring no step counted, ranks that say nothing named."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import read_json, write_json

EXIT_TOLD = 75  # "try again" of sysexits.h; a job script queues the job again on it
HEARD = (signal.SIGTERM, signal.SIGUSR1)
RESTARTS_FILE = "restarts.json"
RESTARTS_LIMIT = 20
HEARTBEATS = ".heartbeats.tmp"  # what a run that is killed leaves behind is cleaned up by that ending
NAMED_RANKS = 8
OTHERS_SAY = 2.0  # seconds
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


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stood when it last said so.

    Attributes:
        step: Optimizer steps it had taken.
        notes: Hooks it had come to since; the same number at the same place of every rank.
        place: The same in words.
        told: How often it had said so, if ever.
    """

    step: int = -1
    notes: int = 0
    place: str = ""
    told: int = 0


class Heartbeats:
    """What every rank says of itself now and then, in a file of its own under the run directory.

    The store of the process group would do for all but rank 0, in whose process it lives: it is stopped with it.

    Args:
        run: Run directory, which all ranks see.
        rank: This one.
        ranks: How many there are.
    """

    def __init__(self, run: Path, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = run / HEARTBEATS, rank, ranks
        self._told = 0

    def tell(self, beat: Heartbeat) -> None:
        """Says where this rank stands; in vain where nothing can be written, which is no reason to end a run."""
        self._told += 1
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._new.write_text(json.dumps(asdict(replace(beat, told=self._told))))
            self._new.replace(self._file(self.rank))

    def suspects(self, own: Heartbeat, silence: float) -> str:
        """Returns a sentence on the ranks that others wait for, some seconds late also where a file system hangs.

        Clocks of nodes differ: silent is who says nothing between two looks.

        Args:
            own: Where this rank stands.
            silence: Seconds between the looks, in which every rank that is alive says something.
        """
        said: list[str] = []

        def listen() -> None:
            with contextlib.suppress(OSError, TypeError):  # no such folder, or the words of another version
                before = self._read()
                time.sleep(silence)
                said.append(waited_for(before, {**self._read(), self.rank: replace(own, told=-1)}))

        listens = threading.Thread(target=listen, daemon=True)
        listens.start()
        listens.join(silence + OTHERS_SAY)
        return said[0] if said else f"Where other ranks stand could not be read in {self.folder}. "

    def end(self) -> None:
        """Removes what this rank said, and the last one the folder."""
        with contextlib.suppress(OSError):
            self._new.unlink(missing_ok=True)
            self._file(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()

    def _read(self) -> dict[int, Heartbeat]:
        return {rank: Heartbeat(**read_json(self._file(rank))) for rank in range(self.ranks)}

    @property
    def _new(self) -> Path:
        return self._file(self.rank).with_suffix(".new")

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"


def waited_for(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat]) -> str:
    """Says which ranks others wait for: those that say nothing, else those that are behind.

    Args:
        before: What each rank had said last.
        after: The same a while later; who said nothing since is silent: stopped, or its node lost.
    """
    silent = {rank: beat for rank, beat in after.items() if beat.told == before[rank].told}
    if silent:
        last = {rank: f"it {beat.place}" for rank, beat in silent.items() if beat.place}
        return f"No sign of life from {_ranks({rank: last.get(rank, 'nothing is known of it') for rank in silent})}. "
    least = min((beat.step, beat.notes) for beat in after.values())
    behind = {rank: f"it {beat.place}" for rank, beat in after.items() if (beat.step, beat.notes) == least}
    return "All ranks stand there. " if len(behind) == len(after) else f"The others wait for {_ranks(behind)}. "


def _ranks(told: Mapping[int, str]) -> str:
    named = [f"rank {rank} ({words})" for rank, words in list(told.items())[:NAMED_RANKS]]
    more = len(told) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
