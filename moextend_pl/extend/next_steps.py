"""What a person can do with the model that was made of their data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from moextend_pl.extend.own_data import QUESTIONS, TEST_SET
from moextend_pl.extend.stage_files import STAGES
from moextend_pl.quickstart.next_steps import next_commands


def next_steps(out: Path) -> list[tuple[str, str]]:
    """Returns purposes and command lines, ready for a shell.

    Args:
        out: Folder of the finished stages, with questions that nothing was learned from.
    """
    tests = out / "data" / TEST_SET
    asked = [json.loads(line) for line in (tests / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    example = next((each for each in asked if each.get("image")), None)
    commands = next_commands(out)
    if example is not None:
        commands = next_commands(out, tests / "images" / example["image"], example["text"])
    measure = ["evaluate", str(out / STAGES[-1]), "--tasks", TEST_SET, "--data", str(tests.parent)]
    commands.insert(2, ("measure it on pictures it never saw", shlex.join(["python", "-m", "moextend_pl", *measure])))
    return commands
