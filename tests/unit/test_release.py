"""A release is refused where version or changes do not fit, and writes both."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("release", ROOT / "benchmarks" / "release.py")
assert SPEC is not None
assert SPEC.loader is not None
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)
CHANGES, VERSION_FILE = release.CHANGES, release.VERSION_FILE


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "moextend_pl").mkdir()
    (tmp_path / VERSION_FILE).write_text('"""x"""\n\n__version__ = "0.9.1"\n')
    (tmp_path / CHANGES).write_text("# Changelog\n\n## Unreleased\n\nData\n\n- news\n")
    return tmp_path


@pytest.mark.parametrize(
    ("version", "words"),
    [("1.0", "such as 0.2.0"), ("v1.0.0", "such as"), ("0.9.1", "above 0.9.1"), ("0.8.12", "above")],
)
def test_other_versions_are_refused(tree: Path, version: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        release.raise_version(tree, version)
    assert (tree / VERSION_FILE).read_text().endswith('"0.9.1"\n')


def test_version_and_changes_are_written(tree: Path) -> None:
    assert release.raise_version(tree, "0.10.0") == [VERSION_FILE, CHANGES]
    assert release.VERSION.findall((tree / VERSION_FILE).read_text()) == ["0.10.0"]
    lines = (tree / CHANGES).read_text().splitlines()
    assert lines[:3] == ["# Changelog", "", "## Unreleased"]
    assert lines[4].startswith("## 0.10.0 (20")
    with pytest.raises(ValueError, match="found nothing"):
        release.raise_version(tree, "0.11.0")


def test_the_project_has_one_version() -> None:
    assert len(release.VERSION.findall((ROOT / VERSION_FILE).read_text())) == 1
