"""The package as a stranger has it: built as a wheel, installed beside the libraries, run from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("moextend_pl", "datamodules", "callbacks", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@dataclass(frozen=True)
class Installed:
    """An installed wheel.

    Attributes:
        wheel: The file.
        site: Folder that it is installed into.
        empty: Folder to run commands in.
    """

    wheel: Path
    site: Path
    empty: Path

    def python(self, *words: str, before: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
        """Runs Python in the empty folder, with the installed packages before all others."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (*before, self.site))
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=self.empty, env=environment, capture_output=True, text=True, timeout=300)

    def run(self, *words: str) -> str:
        """Runs a command of the package and returns what it printed.

        Raises:
            AssertionError: If it fails.
        """
        done = self.python("-m", "moextend_pl", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def install(folder: Path) -> Installed:
    """Builds the wheel from a copy of the sources, so that nothing is left in them, and installs it."""
    source, site, empty = folder / "source", folder / "site", folder / "empty"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*PIP, "wheel", *options, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*PIP, "install", *options, "--target", str(site), str(wheel)], check=True)
    empty.mkdir()
    return Installed(wheel, site, empty)
