"""Test sets of multiple choice, read from their published files."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.question import LETTER, Question, find, lettered, read

LETTERS = "ABCDE"
ROTATED = 1_000_000
"""The index of a rotation is that of its question plus a multiple of this."""
SHORTEST_PICTURE = 64
"""Base64 of a picture is longer; what is shorter is the index of the row that has it."""
MMBENCH_FILES = (
    "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "MMBench_DEV_EN_legacy.tsv", "MMBench_DEV_EN_V11.tsv",
    "mmbench_dev_en_20231003.tsv", "MMBench_DEV_CN.tsv", "mmbench_dev_cn_20231003.tsv",
)  # fmt: skip


def scienceqa(folder: Path) -> Iterator[Question]:
    """Yields ScienceQA's test split: `problems.json`, `pid_splits.json` and `images/test/ID/image.png`."""
    problems = read(find(folder, "problems.json", says="ScienceQA's problems"))
    split = read(find(folder, "pid_splits.json", says="ScienceQA's splits"))["test"]
    pictures = folder / "images" / "test"
    for key in split:
        each = problems[key]
        context = f"Context: {each['hint']}\n" if each.get("hint") else ""
        yield Question(
            key=key,
            prompt=context + each["question"] + lettered(each["choices"]) + LETTER,
            truth={"answer": LETTERS[each["answer"]], "choices": len(each["choices"]), "image": bool(each["image"])},
            picture=str(pictures / key / each["image"]) if each["image"] else "",
        )


def mmbench(folder: Path) -> Iterator[Question]:
    """Yields MMBench's development split, a TSV with pictures inside, every question with all rotations of its options.

    A file that holds rotations is taken as it is; of one that holds questions alone they are made.

    Raises:
        UserError: If a row has no answer, as in the test split.
    """
    path = find(folder, *MMBENCH_FILES, says="MMBench's development split")
    rows = _rows(path)
    pictures = {row["index"]: row["image"] for row in rows if len(row.get("image") or "") > SHORTEST_PICTURE}
    sizes = Counter(int(row["index"]) % ROTATED for row in rows)
    for row in rows:
        if row.get("answer") not in tuple("ABCD"):
            raise UserError(
                f"{path}: expected an answer for question {row['index']}, got {row.get('answer')!r}. Take dev."
            )
        group = str(int(row["index"]) % ROTATED)
        told = row.get("image") or group
        picture = f"data:image/jpeg;base64,{told if len(told) > SHORTEST_PICTURE else pictures[told]}"
        options = _options(row)
        made = range(len(options)) if sizes[int(group)] == 1 else range(1)
        for turn in made:
            turned = options[turn:] + options[:turn]
            answer = "ABCD"[("ABCD".index(row["answer"]) - turn) % len(options)]
            hint = "" if _is_none(row.get("hint")) else f"{row['hint']}\n"
            yield Question(
                key=f"{row['index']}/{turn}",
                prompt=hint + row["question"] + lettered(turned) + LETTER,
                truth={
                    "answer": answer,
                    "options": dict(zip("ABCD", turned, strict=False)),
                    "group": group,
                    "l2": row.get("l2-category") or "",
                    "category": row.get("category") or "",
                },
                picture=picture,
                group=group,
            )


def _rows(path: Path) -> list[dict[str, str]]:
    """Reads a TSV whose fields may be pictures, which Python's limit of a field does not allow for."""
    before = csv.field_size_limit(2**30)
    try:
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t"))
    finally:
        csv.field_size_limit(before)


def _is_none(value: str | None) -> bool:
    return value is None or value.strip().lower() in ("", "nan", "none")


def _options(row: dict[str, str]) -> list[str]:
    """Returns the options up to the first that is not there."""
    found: list[str] = []
    for letter in "ABCD":
        if _is_none(row.get(letter)):
            break
        found.append(row[letter])
    return found
