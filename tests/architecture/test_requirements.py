"""Every library that a file imports is asked for in setup.cfg: a fresh installation has it by our word, not by luck."""

from __future__ import annotations

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
from source import ROOMS, ROOT, imports

# The extras that a run names when it needs one.
BY_USERS = ("quantize", "gpu", "streaming", "parquet", "serve", "demo", "gguf", "sound", "real")
BY_TORCH = {"triton"}  # comes with torch, under other names for other cards; done without where it is not there
BESIDE_THE_PACKAGES = ("tests", "benchmarks")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(*extras: str) -> set[str]:
    """Returns the names of the distributions that the project, installed with these extras, asks for."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for text in lists for line in text.splitlines()]
    return {canonical(re.split(r"[\[<>=!~; ]", line)[0]) for line in lines if line and not line.startswith("#")}


def third_party(folder: str) -> dict[str, set[str]]:
    """Returns, by imported library, the files of a folder that import it."""
    # Tests and benchmarks import their neighbours, files and folders, by bare name.
    neighbours = [path for beside in BESIDE_THE_PACKAGES for path in (ROOT / beside).rglob("*.py")]
    beside = [path.parent.name for path in (ROOT / "integrations").glob("*/*/__init__.py")]
    own = {*ROOMS, *beside, *(name for path in neighbours for name in (path.stem, path.parent.name))}
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), file):
            library = name.split(".")[0]
            if library not in own and library not in sys.stdlib_module_names:
                found.setdefault(library, set()).add(file)
    return found


@pytest.mark.parametrize("folder", [*ROOMS, *BESIDE_THE_PACKAGES])
def test_every_imported_library_is_asked_for(folder: str) -> None:
    extras = BY_USERS if folder in ROOMS else (*BY_USERS, "dev")
    distributions, asked = packages_distributions(), required(*extras)
    libraries = third_party(folder)
    assert libraries
    missing = {
        library: sorted(files)
        for library, files in libraries.items()
        # A library that is not installed has no distribution: its own name stands for it.
        if library not in BY_TORCH and not asked & {canonical(name) for name in distributions.get(library, [library])}
    }
    assert missing == {}
