"""The README stays a page for strangers, and every link of it and of the docs leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source import ROOT

README_LINES, PICTURE_BYTES = 160, 200_000
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(page: Path) -> list[str]:
    """Returns the links of a page that lead to files."""
    found = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in found if "://" not in link]


def test_readme_fits_a_strangers_patience() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_readme_shows_one_picture_that_loads_fast() -> None:
    (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", PAGES[0].read_text(encoding="utf-8"))
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    assert (ROOT / picture).stat().st_size <= PICTURE_BYTES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_readme_leads_to_every_page() -> None:
    assert {f"docs/{page.name}" for page in PAGES[2:]} <= set(links(PAGES[0]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_stage_files_and_scripts_named_are_here(page: Path) -> None:
    named = re.findall(r"(?:configs|benchmarks|tests|notebooks)/[\w./-]+", page.read_text(encoding="utf-8"))
    theirs = [name for name in named if "my_model" not in name]  # a person's own copy
    assert [name for name in theirs if not (ROOT / name.rstrip(".")).exists()] == []


def test_readme_counts_the_families_of_the_table() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (count,) = re.findall(r"^(\d+ of the \d+) families of transformers \d+\.\d+", page, re.MULTILINE)
    assert f"{count} mixture-of-experts families" in PAGES[0].read_text(encoding="utf-8")
