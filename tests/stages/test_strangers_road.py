"""From sixty pictures and a table to a model that is served: the commands of the README, as they are printed."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

import pytest
from helpers.loopback_hub import loopback_hub
from helpers.strangers_pictures import COLOURS, KINDS, draw, draw_pictures

ROOT = Path(__file__).parents[2]
HEADING = "## From your pictures to a served model"
SECONDS, PICTURES = 300.0, 60
HEALTH = "http://127.0.0.1:8000/health"


def blocks(language: str) -> list[str]:
    """Returns the code blocks of the section of the README in a language; empty for commands."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def processor_seconds() -> float:
    """Returns the seconds of a processor that finished children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def blind_accuracy(rows: list[dict[str, object]]) -> float:
    """Returns the share of right answers of a model that sees nothing and always says the best one word."""
    counts = Counter(json.dumps(row["truth"]) for row in rows)
    return max(counts.values()) / len(rows)


def asked_as_printed(line: str, client: str, desk: Path, environment: dict[str, str]) -> str:
    """Starts the server, runs the client's code as soon as it listens, and ends the server."""
    with subprocess.Popen(f"exec {line}", shell=True, cwd=desk, env=environment) as server:
        try:
            for _ in range(240):
                assert server.poll() is None
                try:
                    urlopen(HEALTH, timeout=10).close()
                    break
                except OSError:
                    time.sleep(1)
            done = subprocess.run(
                [sys.executable, "-c", client], cwd=desk, env=environment, capture_output=True, text=True
            )
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_section_is_a_few_commands_and_a_client() -> None:
    (commands,), (client,) = blocks(""), blocks("python")
    lines = commands.splitlines()
    assert all(line.startswith("python -m moextend_pl ") for line in lines)
    assert [line.split()[3] for line in lines] == ["extend", "generate", "evaluate", "report", "export", "serve"]
    assert "openai" in client


@pytest.mark.slow
def test_a_stranger_gets_from_pictures_to_a_served_model_in_five_minutes(quickstart: Path, tmp_path: Path) -> None:
    desk = tmp_path / "desk"
    desk.mkdir()
    draw_pictures(desk / "my_pictures", PICTURES)
    for kind in KINDS:
        assert list((desk / "my_pictures").glob(f"*_{kind}.*"))
    draw(desk / "photo", "exif", "red", random.Random(7))
    shutil.copytree(quickstart / "0_language" / "base", tmp_path / "hub/org/moe")
    shutil.copytree(quickstart / "0_vision" / "encoder", tmp_path / "hub/org/tower")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "HF_HUB_CACHE": str(tmp_path / "cache")}
    (commands,), (client,) = blocks(""), blocks("python")
    said: dict[str, str] = {}
    begun, used = time.monotonic(), processor_seconds()
    with loopback_hub(tmp_path / "hub") as address:
        environment["HF_ENDPOINT"] = address
        for line in commands.splitlines():
            name = line.split()[3]
            if name == "serve":
                said[name] = asked_as_printed(line, client, desk, environment)
                continue
            done = subprocess.run(["bash", "-c", line], cwd=desk, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
            said[name] = done.stdout.strip()
    # On a busy machine the seconds on the clock say little.
    assert min(time.monotonic() - begun, processor_seconds() - used) < SECONDS
    assert said["generate"] == said["serve"]
    assert said["serve"] in COLOURS
    lines = (desk / "runs/mine/3_extend/evaluation/own/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    right = sum(row["prediction"] in row["truth"] for row in rows) / len(rows)
    assert len(rows) >= 8
    assert right >= max(0.75, blind_accuracy(rows) + 0.25)
    assert "exact_match" in said["evaluate"]
    assert "python -m moextend_pl evaluate runs/mine/3_extend" in said["extend"]
    assert (desk / "runs/mine/report.html").is_file()
    assert not [found for found in desk.iterdir() if found.suffix in (".yaml", ".yml")]
