"""The command line: commands, help, messages."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runs import error_of

from moextend_pl import cli
from moextend_pl.cli import commands

ROOT = Path(__file__).parents[4]


def test_overview_lists_every_command_and_imports_no_torch() -> None:
    code = "import sys; from moextend_pl.cli.commands import main; rc = main([]); print('torch' in sys.modules, rc)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False 0"
    for command in (*commands.STAGE_COMMANDS, *commands.TOOL_COMMANDS):
        assert sum(line.startswith(f"  {command} ") for line in out.splitlines()) == 1


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_is_the_overview(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == commands.overview()


def test_mistyped_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, ["fti"]) == "there is no command 'fti'; did you mean 'fit'?"


def test_help_of_a_stage_command_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m moextend_pl" in out
    assert "--fresh" in out


def test_tool_command_gets_the_remaining_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    tool = type(sys)("toy_tool")
    tool.main = lambda argv: seen.append(argv) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_tool", tool)
    monkeypatch.setitem(commands.TOOL_COMMANDS, "shards", ("toy_tool", ""))
    assert cli.main(["shards", "build", "--out", "x"]) == 5
    assert seen == [["build", "--out", "x"]]


def test_only_commands_that_go_on_say_so_when_they_are_interrupted(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(commands, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for command, told in {"fit": True, "shards build llava": True, "shards check": False, "test": False}.items():
        assert (cli.main(command.split()), "continues" in capsys.readouterr().err) == (130, told)


def test_own_messages_go_to_stderr_in_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    commands.configure_logging()
    commands.configure_logging()
    logging.getLogger("callbacks.anything").info("grew %d experts", 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(" I grew 2 experts")
