"""One function over many jobs in several processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from moextend_pl.contracts import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Result]]:
    """Yields (number of the job, result) as jobs are done.

    The work is a function of a module, so that it can be sent to a process; one worker does it in this one.

    Raises:
        UserError: If a process died.
    """
    if workers < 2 or len(jobs) < 2:
        for number, job in enumerate(jobs):
            yield number, work(job)
        return
    # Forked where that is safe: starting afresh would import torch in each process.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_leave_interrupts)
    try:
        futures = {pool.submit(work, job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process died, most often for want of memory. Start the command again with fewer workers; what is "
            "finished is kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts() -> None:
    """Ctrl-C stops the main process, which lets the workers finish what they hold."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
