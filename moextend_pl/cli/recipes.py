"""`python -m moextend_pl configs`: the stage files that come with the package, found by name from anywhere."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_text

HOME = Path(__file__).parents[1] / "configs"
"""Folder of the package's own stage files; in the repository a link to `configs/`."""

WIDTH = 110
TEXTS = (".yaml", ".sbatch", ".json")
BASE_LINE = re.compile(r"^base:.*$", re.MULTILINE)
FILE_NAME = re.compile(r"[\w./-]+\.yaml")


def own_config(name: Path) -> Path | None:
    """Returns the package's own file of a name, with or without `configs/` before it; None if it has none.

    Args:
        name: For example `mixtral_8x7b/recipe.yaml`, as a `base` or `--config` names it where no such file lies.
    """
    if name.is_absolute() or ".." in name.parts:
        return None
    parts = name.parts[1:] if name.parts[:1] == (HOME.name,) else name.parts
    path = HOME.joinpath(*parts)
    return path if parts and path.is_file() else None


def recipes() -> dict[str, Path]:
    """Returns the folders of the package's own files by name."""
    return {path.name: path for path in sorted(HOME.iterdir()) if path.is_dir()}


def _purpose(path: Path) -> str:
    """Returns the first sentence of the comment that a file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#!").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")


def listing() -> str:
    """Returns the recipes with the purpose of each stage, one line a file."""
    lines: list[str] = []
    for name, folder in recipes().items():
        lines += [*([""] if lines else []), name]
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".sbatch"))
        width = max(len(str(path.relative_to(folder))) for path in files)
        for path in files:
            purpose = "" if path.suffix == ".sbatch" else _purpose(path)
            line = f"  {path.relative_to(folder)!s:<{width}}  "
            lines.append((line + textwrap.shorten(purpose, WIDTH - len(line), placeholder=" ...")).rstrip())
    return "\n".join(lines) + "\n"


def copy(name: str, target: Path) -> list[Path]:
    """Copies a recipe so that it works where it lies, and can be edited.

    A `base` outside of the recipe is named as the package's own, and runs go to `runs/` under the name of the copy.

    Args:
        name: Of the recipe.
        target: A folder that is there, to copy into, or the copy itself.

    Returns:
        The files written.

    Raises:
        UserError: If there is no such recipe, or the copy would lie on files.
    """
    if name not in recipes():
        raise UserError(f"Expected a recipe out of {', '.join(recipes())}, got {name!r}.")
    source = recipes()[name]
    copied = target / name if target.is_dir() else target
    if copied.exists():
        raise UserError(f"Expected a new folder for the copy, found {copied}. Name another one.")
    written = []
    for path in sorted(path for path in source.rglob("*") if path.suffix in TEXTS):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            text = _moved(text, path, source).replace(f"runs/{name}", f"runs/{copied.resolve().name}")
            text = text.replace(f"configs/{name}/", f"{copied}/")
        place = copied / path.relative_to(source)
        write_text(place, text)
        place.chmod(path.stat().st_mode)
        written.append(place)
    return written


def _moved(text: str, path: Path, source: Path) -> str:
    """Names each `base` that lies outside of a recipe by its place among the package's own files."""

    def named(found: re.Match[str]) -> str:
        base = (path.parent / found[0]).resolve()
        inside = base.is_relative_to(source.resolve())
        return found[0] if inside else str(base.relative_to(HOME.resolve()))

    return BASE_LINE.sub(lambda line: FILE_NAME.sub(named, line[0]), text)


def main(argv: Sequence[str]) -> int:
    """Lists or copies recipes.

    Raises:
        UserError: If a recipe cannot be copied.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl configs", description="The stage files that come with the package."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="print the recipes and their files")
    copying = actions.add_parser("copy", help="copy a recipe to edit it")
    copying.add_argument("recipe", help="its name, for example mixtral_8x7b")
    copying.add_argument("target", type=Path, help="folder to copy into, or a new one, which names the runs too")
    options = parser.parse_args(argv)
    if options.action == "list":
        sys.stdout.write(listing())
        return 0
    for path in copy(options.recipe, options.target):
        sys.stdout.write(f"{path}\n")
    return 0
