"""Runs of the command line in this process, of the stage in `tests/unit/cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moextend_pl import cli

ALLOW = ["--allow-class-path", "toy_stage"]


def fit(stage: Path, *more: str) -> Any:
    """Trains the stage."""
    return cli.run(["fit", "--config", str(stage), *ALLOW, *more])


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Runs a command that must fail as a user's mistake and returns its one line."""
    assert cli.main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")
