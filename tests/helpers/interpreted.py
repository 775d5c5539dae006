"""Runs functions of a test file in a process of its own, whose Triton kernels are interpreted on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def interpreted(file: str, what: str, tmp_path: Path) -> Any:
    """Returns what a function of a test file returns there; Triton chooses when it is imported, so not here.

    Args:
        file: The test file, which calls `answer` where it is the program.
        what: Name of the function; what it returns is plain data.
        tmp_path: Folder for the answer.
    """
    out = tmp_path / f"{what}.json"
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, file, what, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def answer(functions: dict[str, Any]) -> None:
    """Writes what the function that the command line names returns."""
    Path(sys.argv[2]).write_text(json.dumps(functions[sys.argv[1]]()))
