"""The pages that are read off the code are current, and leave no key unexplained."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from source import ROOT


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current(pages: ModuleType) -> None:
    for name, text in ((pages.ERRORS, pages.errors_page()), (pages.CONFIGURATION, pages.configuration_page())):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_key_has_a_meaning(pages: ModuleType) -> None:
    explained = {
        f"{kind.__name__}.{key}": bool(text)
        for kinds in pages.SECTIONS.values()
        for kind in kinds
        for key, _, text in pages.keys(kind)
    }
    assert len(explained) > 80
    assert [key for key, has in explained.items() if not has] == []


def test_a_sentence_is_found_by_its_words(pages: ModuleType) -> None:
    # As the command line prints it for a probe without a plan.
    assert "Expected an extension plan at …, found no file. Run the probe stage first." in pages.errors_page()
