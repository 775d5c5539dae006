"""Several processes that run the same commands of the command line; a script that imports once and then forks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
Round = tuple[int, list[list[str]]]
"""Number of processes, and the commands that each of them runs one after another."""


def run_rounds(rounds: Sequence[Round], folder: Path, timeout: float = 500) -> None:
    """Runs one round after another.

    Args:
        rounds: Processes of one are gone when the next one begins.
        folder: Where the logs of the processes go.
        timeout: Seconds for all of them.

    Raises:
        AssertionError: If a process fails; with the end of its log.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    script = [sys.executable, __file__, json.dumps(list(rounds))]
    done = subprocess.run(script, env=environment, cwd=folder, timeout=timeout, check=False)
    assert done.returncode == 0, "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("rank*.log")))


def _run_round(number: int, ranks: int, commands: list[list[str]]) -> bool:
    """Forks and waits; returns whether all processes came to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", WORLD_SIZE=str(ranks))
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank))
            rank_zero_only.rank = rank  # Lightning has asked the environment when it was imported
            log = os.open(f"rank{rank}_of_round{number}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            _run_commands(commands)
        children.add(child)
    while children:
        child, code = os.wait()
        children.discard(child)
        if code:  # the others would wait for this one
            for other in children:
                os.kill(other, signal.SIGKILL)
            return False
    return True


def _run_commands(commands: list[list[str]]) -> None:
    try:
        for argv in commands:
            cli.run(argv)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others, which wait for this one, see its connections close
    os._exit(0)


if __name__ == "__main__":
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    # What every command imports, once for all processes.
    import datamodules.image_text  # noqa: F401
    import moextend_pl.cli.stage
    import moextend_pl.models.moextend  # noqa: F401
    from moextend_pl import cli

    torch.set_num_threads(1)
    for place, (processes, argvs) in enumerate(json.loads(sys.argv[1])):
        if not _run_round(place, processes, argvs):
            sys.exit(1)
