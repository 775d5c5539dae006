"""The processes that read and encode samples beside a run."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import torch

START_METHOD = "fork" if sys.platform == "linux" else None
"""How workers start. Forked ones share the index and start in milliseconds; fresh ones would import torch for seconds
each. Forking beside threads is safe for what they do: no CUDA, one thread (`begin_worker`), and tokenizers without
their own pool of threads, which they give up in a fork."""

WORKER_PATIENCE = 900
"""Seconds after which a batch that does not come is an error, and not a run that stands still for ever."""

WORKER_GRACE = 60
"""Seconds that a worker goes on after it was told to end."""


def worker_options(num_workers: int) -> dict[str, Any]:
    """Returns how every loader of torch starts its workers here."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": begin_worker,
        "timeout": WORKER_PATIENCE if num_workers else 0,
        "multiprocessing_context": START_METHOD if num_workers else None,
    }


def begin_worker(_worker: int) -> None:
    """Keeps each worker to one thread, since many slow each other down, and at work while its run comes to an end.

    A scheduler tells all processes of a job to end. The run takes its step to the end, for which it needs its data.
    """
    torch.set_num_threads(1)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
