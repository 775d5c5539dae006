"""What README and docs tell a person to type works as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_world import TinyWorld, picture

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGINNINGS = ("python", "make ", "for ", "cp ", "pip ", "sbatch ")
# Beginning of a command -> what runs it, where that is not this file.
RUN_ELSEWHERE = {
    "make quickstart": ".ci/run",
    "make test": ".ci/run",
    "python3 -m venv": "Makefile",
    "pip install": "Makefile",  # a test changes no environment that other tests run in
    "python -m moextend_pl shards build easy-vqa": "moextend_pl/quickstart/command.py",
    "for stage in 0_vision 0_language 1_align 2_probe 3_extend": "moextend_pl/quickstart/command.py",
    "for stage in 1_align 2_probe 3_extend": "tests/contracts/test_every_config.py",
    "for stage in 0_vision 0_language 1_pretrain": "tests/contracts/test_every_config.py",
    "make real": "tests/stages/test_real.py",  # with a tiny model: the real one is 93 MB
    "python -m moextend_pl fit --config configs/easy_vqa": "tests/contracts/test_every_config.py",
    "python -m moextend_pl test --config configs/easy_vqa": "tests/contracts/test_every_config.py",
    "python -m moextend_pl extend": "tests/unit/moextend_pl/extend/test_extend_command.py",
    "python -m moextend_pl generate": "tests/unit/moextend_pl/models/test_second_task.py",
    "python -m moextend_pl chat": "tests/unit/moextend_pl/inference/test_chat.py",
    "python -m moextend_pl predict": "tests/stages/test_killed_predictions.py",
    "python -m moextend_pl evaluate": "tests/unit/moextend_pl/evaluation/test_evaluate_command.py",
    "python -m moextend_pl rescore": "tests/unit/moextend_pl/evaluation/test_evaluate_command.py",
    "python -m moextend_pl export": "tests/unit/moextend_pl/export/test_share.py",
    "python -m moextend_pl serve": "tests/unit/moextend_pl/export/serving/test_server.py",
    "python -m moextend_pl demo": "tests/unit/moextend_pl/export/demo/test_demo_page.py",
    "python -m moextend_pl report runs/mine": "tests/stages/test_strangers_road.py",
    "python -m moextend_pl merge": "tests/unit/moextend_pl/export/test_share.py",
    "python benchmarks/claims.py": "tests/unit/test_claims.py",  # hours
    "python benchmarks/distillation.py": "tests/unit/test_distilled_students.py",
    "python -m moextend_pl assemble": "tests/unit/moextend_pl/export/test_assemble.py",
    "sbatch configs/slurm/train.sbatch": "tests/architecture/test_configs.py",
}


def commands(page: Path) -> list[str]:
    """Returns the lines of a page's code blocks that are commands, without their comments."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in found if not language]
    lines = [re.sub(r"\s+#\s.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(BEGINNINGS)]


def run_here(page: Path) -> list[str]:
    return [line for line in commands(page) if not line.startswith(tuple(RUN_ELSEWHERE))]


def test_a_command_that_is_run_elsewhere_is_named_by_a_page_and_by_what_runs_it() -> None:
    told = [line for page in PAGES for line in commands(page)]
    assert len(told) > 15
    assert [start for start in RUN_ELSEWHERE if not any(line.startswith(start) for line in told)] == []
    assert [place for place in RUN_ELSEWHERE.values() if not (ROOT / place).exists()] == []


@pytest.fixture
def desk(tmp_path: Path, tiny_world: TinyWorld) -> Path:
    """A folder with what the pages suppose: pictures and conversations, a tokenizer, shards of others, the configs."""
    entries = []
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
        turns = [{"from": "human", "value": "<image>\nwhat is the color ?"}, {"from": "gpt", "value": "blue"}]
        entries.append({"id": f"KEY{number or ''}", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    shutil.copytree(tmp_path / "images", tmp_path / "my_data")
    shutil.copy(tmp_path / "data.json", tmp_path / "my_data")
    shutil.copytree(tiny_world.base, tmp_path / "path" / "to" / "tokenizer")
    others = Path(tiny_world.data("mixed"))
    (tmp_path / "other_shards").mkdir()
    for tar in others.glob("*.tar"):
        shutil.copy(tar, tmp_path / "other_shards")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)], ids=lambda page: page.stem)
def test_commands_of_a_page_work_one_after_the_other(page: Path, desk: Path) -> None:
    # `python` is the one that runs the tests, as in an activated environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    for line in run_here(page):
        done = subprocess.run(["bash", "-c", line], cwd=desk, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
