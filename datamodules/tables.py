"""Tables with columns for picture, question and answer, as entries in LLaVA's form: CSV, TSV, Parquet, JSON rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.foreign import CAPTION_QUESTION
from datamodules.shards import conversation
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_MARK

TABLES = (".csv", ".tsv", ".parquet")
COLUMNS = {
    "picture": ("image", "picture", "image_path", "file_name", "filename", "path", "photo", "img"),
    "question": ("question", "prompt", "instruction", "query"),
    "answer": ("answer", "caption", "response", "text", "label", "output"),
}
"""Names by which a column is found, upper and lower case alike; of several that are there the first one counts."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
        picture: Name of a file, or its content (Parquet); an empty cell is a sample without a picture.
        question: What is asked; None if there is no such column and every picture is asked the same.
        answer: What is to be answered.
    """

    picture: str | None
    question: str | None
    answer: str

    def __str__(self) -> str:
        named = {"picture": self.picture, "question": self.question, "answer": self.answer}
        return ", ".join(f"{what} = {name}" for what, name in named.items() if name is not None)


def find_columns(names: Sequence[str], asked: Mapping[str, str], origin: Path) -> Columns:
    """Finds the columns of a table by what a user said, or by their names.

    Raises:
        UserError: If one that was asked for is not there, or there is no answer, or neither picture nor question.
    """
    lower = {name.strip().lower(): name for name in reversed(names)}
    found: dict[str, str | None] = {}
    for what, known in COLUMNS.items():
        wanted = [asked[what]] if what in asked else known
        near = (name if name in names else lower.get(name.lower()) for name in wanted)
        found[what] = next((name for name in near if name is not None), None)
        if what in asked and found[what] is None:
            raise UserError(f"{origin}: expected a column {asked[what]!r} for the {what}, got {', '.join(names)}.")
    answer = found["answer"]
    if answer is None or found["picture"] is found["question"] is None:
        raise UserError(
            f"{origin}: expected columns for picture, question and answer, got {', '.join(map(str, names))}. Name "
            "them, as in `--columns picture=img,question=q,answer=a`."
        )
    return Columns(found["picture"], found["question"], answer)


def entries_of(rows: Iterable[Mapping[str, Any]], columns: Columns, question: str | None) -> list[dict[str, Any]]:
    """Returns an entry a row; the picture stands before the question.

    Args:
        rows: Cells by column.
        columns: Which of them are read.
        question: What is asked where the table has no question.
    """
    entries = []
    for row in rows:
        picture = row.get(columns.picture) if columns.picture else None
        asked = row.get(columns.question) if columns.question else question or CAPTION_QUESTION
        mark = f"{IMAGE_MARK}\n" if picture and IMAGE_MARK not in str(asked) else ""
        said = _text(asked)
        turns = conversation((mark + said if isinstance(said, str) else said, _text(row.get(columns.answer))))
        entries.append({"id": row.get("id"), "image": picture or None, "conversations": turns})
    return entries


def _text(cell: Any) -> Any:
    """Returns a cell as text; a list or the like stays what it is, and is told as a problem of its entry."""
    return "" if cell is None or cell != cell else str(cell) if isinstance(cell, str | int | float) else cell


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Returns column names and rows of a CSV or TSV file in UTF-8; a semicolon may stand for the comma.

    Raises:
        UserError: If it is no such file, or a row has more or fewer cells than the first.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            sign = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in head and "," not in head else ","
            lines = csv.reader(stream, delimiter=sign, strict=True)
            names = next(lines, [])
            rows = []
            for cells in lines:
                if cells and len(cells) != len(names):
                    raise UserError(
                        f"{path}: line {lines.line_num}: expected {len(names)} cells as in the first line, got "
                        f"{len(cells)}. Put cells that hold the separator in double quotes."
                    )
                if cells:
                    rows.append(dict(zip(names, cells, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: expected a table in UTF-8, got text that fails: {error}. Save it as CSV UTF-8."
        ) from error
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected columns of different names, got {', '.join(names)}. Rename one.")
    return names, rows


def read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns column names and rows of a Parquet file; pictures inside of it are held in memory.

    Raises:
        UserError: If pyarrow is not installed, or the file is no such file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs a package. Run `pip install pyarrow`, or save it as CSV.") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: expected a Parquet file, got bytes that fail: {error}. Copy it again.") from error
    return table.column_names, table.to_pylist()
