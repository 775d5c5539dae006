"""Parts of a page that a command writes: they stand between `<!-- COMMAND -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def _part(mark: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(mark)} -->\n)(?P<text>.*?)(\n<!-- end -->)", re.DOTALL)


def part(page: Path, mark: str) -> str:
    """Returns what stands at the mark of a page."""
    (found,) = _part(mark).finditer(page.read_text(encoding="utf-8"))
    return str(found["text"])


def put(page: Path, mark: str, text: str) -> None:
    """Puts a text in the place of what stands at the mark of a page; every mark stands there once."""
    written, count = _part(mark).subn(lambda found: found[1] + text + found[3], page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"Expected one part {mark!r} in {page}, found {count}.")
    page.write_text(written, encoding="utf-8")


def grid(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
