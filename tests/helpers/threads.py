"""Ranks as threads of this process, for what they send each other; torch's own means of testing collectives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

Result = TypeVar("Result")


def on_ranks(ranks: int, run: Callable[[int], Result], timeout: float = 60) -> list[Result]:
    """Runs a function on every rank at once.

    Args:
        ranks: Their number.
        run: From the rank to a result.
        timeout: Seconds until ranks that wait for each other are given up.

    Returns:
        Results by rank.
    """
    results, errors, store = {}, [], dist.HashStore()

    def work(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
        try:
            results[rank] = run(rank)
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)  # wakes the others
        finally:
            dist.destroy_process_group()

    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(ranks)]
