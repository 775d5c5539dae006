"""Trains a stage on a disk that turns read-only; run in a mount namespace of its own.

Arguments: config of the stage, folder that becomes the disk, rows of metrics.csv after which it turns (0: at once).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from helpers.stages import start


def mount(*options: str) -> None:
    """Mounts something.

    Raises:
        CalledProcessError: If this machine does not allow it.
    """
    subprocess.run(["mount", *options], check=True, capture_output=True)


def turn_read_only(disk: str) -> None:
    """Lets every file that is opened from now on be on a read-only disk; the lock of a run stays open for writing."""
    mount("--bind", disk, disk)
    mount("-o", "remount,bind,ro", disk)


def main(config: Path, disk: str, rows: int) -> int:
    """Returns the exit code of the stage."""
    mount("-t", "tmpfs", "none", disk)
    run, log = Path(disk) / "run", Path(disk) / "run" / "metrics.csv"
    run.mkdir()
    if not rows:
        turn_read_only(disk)
    process = start(config)
    while rows and (not log.exists() or log.read_text().count("\n") <= rows):
        assert process.poll() is None, "ended too early"
        time.sleep(0.01)
    if rows:
        turn_read_only(disk)
    code = process.wait(120)
    (config.parent / "left.txt").write_text("\n".join(sorted(p.name for p in run.rglob("*") if p.is_file())))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
