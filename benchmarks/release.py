"""Builds and checks what would be released, and with a version makes the commit and the tag: `make release`.

Without a version the tree is built as it is. Nothing is uploaded and nothing is pushed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION_FILE, CHANGES = "moextend_pl/__init__.py", "CHANGELOG.md"
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
UNRELEASED = "## Unreleased\n"


def sh(*words: str, cwd: Path = ROOT, **more: str) -> str:
    """Runs a command and returns what it printed; ends the release where it fails."""
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **more}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(words)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def raise_version(root: Path, version: str) -> list[str]:
    """Writes a version, and its heading into the changes; returns the files that changed.

    Raises:
        ValueError: If it is none, is not above the present one, or nothing is said to have changed.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"expected a version such as 0.2.0, got {version}")
    source, changes = (root / name for name in (VERSION_FILE, CHANGES))
    text, told = source.read_text(encoding="utf-8"), changes.read_text(encoding="utf-8")
    (present,) = VERSION.findall(text)
    if [int(n) for n in version.split(".")] <= [int(n) for n in present.split(".")]:
        raise ValueError(f"expected a version above {present}, got {version}")
    if not re.search(re.escape(UNRELEASED) + r"\n(?!## )\S", told):
        raise ValueError(f"expected what changed below '{UNRELEASED.strip()}' in {CHANGES}, found nothing")
    today = datetime.datetime.now(datetime.UTC).date()
    source.write_text(VERSION.sub(f'__version__ = "{version}"', text), encoding="utf-8")
    changes.write_text(told.replace(UNRELEASED, f"{UNRELEASED}\n## {version} ({today})\n", 1), encoding="utf-8")
    return [VERSION_FILE, CHANGES]


def build(root: Path, dist: Path) -> tuple[Path, Path]:
    """Builds the source archive of what git holds, and the wheel out of that archive; returns both."""
    dist.mkdir(parents=True, exist_ok=True)
    for old in dist.glob("moextend_pl-*"):
        old.unlink()
    (version,) = VERSION.findall((root / VERSION_FILE).read_text(encoding="utf-8"))
    name = f"moextend_pl-{version}"
    # `stash create` names the working tree, changes included; it says nothing where there are none.
    nobody = ("-c", "user.name=release", "-c", "user.email=release@localhost")  # its author is never seen
    tree = sh("git", *nobody, "stash", "create", cwd=root).strip() or "HEAD"
    archive = dist / f"{name}.tar.gz"
    sh("git", "archive", "--format=tar.gz", f"--prefix={name}/", "--output", str(archive), tree, cwd=root)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        options = ("--quiet", "--no-deps", "--no-build-isolation")
        source = str(Path(folder) / name)
        sh(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(dist), source)
    (wheel,) = dist.glob("moextend_pl-*.whl")
    return archive, wheel


def check(root: Path, wheel: Path) -> None:
    """Compares a wheel with the tree, and runs it from an empty folder; ends the release where it fails."""
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        (facts,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(file.read(facts).decode("utf-8"))
    (version,) = VERSION.findall((root / VERSION_FILE).read_text(encoding="utf-8"))
    listed = sh("git", "ls-files", "moextend_pl", "datamodules", "callbacks", "configs", cwd=root).splitlines()
    wanted = {f"moextend_pl/{name}" if name.startswith("configs/") else name for name in listed}
    missing = sorted(wanted - {"moextend_pl/configs"} - held)
    if missing or about["Version"] != version or not about.get_payload():
        sys.exit(f"error: {wheel.name} says it is {about['Version']} and lacks {missing[:5]}")
    with tempfile.TemporaryDirectory() as folder:
        site = str(Path(folder) / "site")
        options = ("--quiet", "--no-deps", "--target", site)
        sh(sys.executable, "-m", "pip", "install", *options, str(wheel))
        where = Path(folder) / "empty"
        where.mkdir()
        for words in (["--help"], ["configs", "list"], ["configs", "copy", "mixtral_8x7b", "."]):
            sh(sys.executable, "-m", "moextend_pl", *words, cwd=where, PYTHONPATH=site)
        stage = "mixtral_8x7b/3_extend.yaml"
        sh(sys.executable, "-m", "moextend_pl", "plan", "--config", stage, "--gpu", "h200", cwd=where, PYTHONPATH=site)


def main() -> None:
    """Builds, checks, and tags where a version is given; puts the files back where a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", default="", help="of the release; left out, nothing is committed")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the result (default: dist)")
    options = parser.parse_args()
    changed: list[str] = []
    if options.version:
        if sh("git", "status", "--porcelain", "--untracked-files=no").strip():
            sys.exit("error: commit your changes first")
        if sh("git", "tag", "--list", f"v{options.version}").strip():
            sys.exit(f"error: there is a tag v{options.version} already")
        try:
            changed = raise_version(ROOT, options.version)
        except ValueError as error:
            sys.exit(f"error: {error}")
    try:
        archive, wheel = build(ROOT, options.dist)
        check(ROOT, wheel)
    except BaseException:
        if changed:
            sh("git", "checkout", "--", *changed)
        raise
    print(f"built and checked: {archive}, {wheel}")
    if changed:
        sh("git", "commit", "--quiet", "--message", f"Release {options.version}", "--", *changed)
        sh("git", "tag", "--annotate", "--message", f"Release {options.version}", f"v{options.version}")
        print(f"tagged v{options.version}; publish with: git push --follow-tags, and twine upload {options.dist}/*")


if __name__ == "__main__":
    main()
