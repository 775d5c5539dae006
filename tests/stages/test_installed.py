"""An installed wheel does outside of the repository what the repository does."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
from helpers.installed import ROOT, Installed, install

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("installed"))


def test_wheel_holds_every_file_of_the_packages_and_the_stage_files(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = set(wheel.namelist())
    sources = [path for room in ("moextend_pl", "datamodules", "callbacks") for path in (ROOT / room).rglob("*.py")]
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in sources}
    wanted |= {f"moextend_pl/{path.relative_to(ROOT)}" for path in configs}
    assert len(configs) > 40
    assert wanted <= held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "docs"))]


def test_recipes_are_listed_copied_and_planned(installed: Installed) -> None:
    where = installed.python("-c", "import moextend_pl, callbacks, datamodules; print(callbacks.__file__)")
    assert where.stdout.startswith(str(installed.site))
    assert "mixtral_8x7b\n  1_align.yaml" in installed.run("configs", "list")
    installed.run("configs", "copy", "olmoe_1b_7b", "mine")
    (installed.empty / "stage.yaml").write_text("base: mine/3_extend.yaml\ntrainer: {max_steps: 7}\n")
    assert re.search(r"optimizer steps +7\n", installed.run("plan", "--config", "stage.yaml", "--gpu", "h200"))


def test_quickstart_begins_in_an_empty_folder(installed: Installed) -> None:
    installed.run("quickstart", "--until", "0_vision", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1")
    run = installed.empty / "runs" / "quickstart" / "0_vision"
    assert (run / "stage.json").is_file()
    assert (run / "encoder").is_dir()


def test_another_package_under_our_names_is_told(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").touch()
    done = installed.python("-m", "moextend_pl", "fit", "--config", "easy_vqa/1_align.yaml", before=[tmp_path])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"Expected the package `callbacks` of moextend_pl in {installed.site}" in line
    assert f"found another one at {tmp_path / 'callbacks'}" in line
