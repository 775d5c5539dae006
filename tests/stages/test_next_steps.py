"""What the quickstart tells a person to type next works as it is printed."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from moextend_pl.quickstart.next_steps import EXAMPLE, NEXT, QUESTION, next_commands

ROOT = Path(__file__).parents[2]


def asked_over_http(line: str, folder: Path, environment: dict[str, str], out: Path) -> str:
    """Starts the server, asks it about the picture as soon as it listens, and ends it."""
    body = {
        "model": "3_extend",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(out / EXAMPLE)}"}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ],
    }
    address = "http://127.0.0.1:8000/v1/chat/completions"
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with subprocess.Popen(f"exec {line}", shell=True, cwd=folder, env=environment) as server:
        try:
            for _ in range(120):
                assert server.poll() is None
                try:
                    with urlopen(request, timeout=60) as reply:
                        return str(json.load(reply)["choices"][0]["message"]["content"]).strip()
                except URLError as error:
                    if not isinstance(error.reason, ConnectionError):
                        raise
                    time.sleep(1)
        finally:
            server.terminate()
    raise AssertionError("the server never listened")


def shown_on_a_page(line: str, folder: Path, environment: dict[str, str]) -> str:
    """Starts the page, fetches it as soon as it is there, and ends it."""
    with subprocess.Popen(f"exec {line}", shell=True, cwd=folder, env=environment) as server:
        try:
            for _ in range(120):
                assert server.poll() is None
                try:
                    with urlopen("http://127.0.0.1:7860", timeout=60) as page:
                        return str(page.read().decode())
                except URLError:
                    time.sleep(1)
        finally:
            server.terminate()
    raise AssertionError("there was no page")


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.slow
def test_every_command_that_the_quickstart_ends_with_runs_as_printed(quickstart: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "quick start"  # a name that a shell would take apart
    # Stages find one another by paths beside them.
    shutil.copytree(quickstart, out, ignore=shutil.ignore_patterns("checkpoints", "exported", "shared", "report.html"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    said = {}
    for purpose, line in next_commands(out):
        if " serve " in line:
            said[purpose] = asked_over_http(line, tmp_path, environment, out)
            continue
        if " demo " in line:
            said[purpose] = shown_on_a_page(line, tmp_path, environment)
            continue
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(line, shell=True, input=f"{QUESTION}\n/quit\n", **options)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said[purpose] = done.stdout
    answer = said["ask it about a picture"].strip()
    assert answer
    assert answer in said["talk with it"]
    assert said["let other tools ask it"] == answer
    assert "3_extend" in said["talk with it on a web page, and see which experts answer"]
    assert all((out / name).exists() for name in ("report.html", "exported/config.json", "shared/delta.safetensors"))


def test_commands_are_quoted_for_a_shell(tmp_path: Path) -> None:
    lines = [line for _, line in next_commands(tmp_path / "it's here")]
    assert all(str(tmp_path / "it's here") in " ".join(shlex.split(line)) for line in lines)
    assert len(lines) == len(NEXT)
