"""Samples of shards as a test set of one's own: what each asks first, with its picture, for `evaluate --tasks own`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from datamodules.reader import RawSample, ShardReader
from moextend_pl.contracts import UserError
from moextend_pl.samples.pixels import open_image
from moextend_pl.samples.turns import IMAGE_MARK

QUESTIONS_FILE, PICTURES = "questions.jsonl", "images"
LATER, SEVERAL, TOLD = "later questions of conversations", "samples with several pictures", "samples with instructions"
HEARD = "samples with sounds"


def write_questions(place: str | Path, out: Path, limit: int) -> tuple[int, Counter[str]]:
    """Writes `questions.jsonl` and `images/`.

    Args:
        place: Folder of shards, or the address of a remote one.
        out: Folder to write, without questions of something else in it.
        limit: Most questions; they are spread over the set.

    Returns:
        How many questions there are, and what was left out, counted by what it is.

    Raises:
        UserError: If a sample cannot be read, or none can be asked.
    """
    reader = ShardReader(place)
    count = min(limit, len(reader))
    left: Counter[str] = Counter()
    rows = []
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    for number in (place * len(reader) // count for place in range(count)):
        raw = reader.read(number)
        if len(raw.images) > 1 or raw.sounds or raw.turns[0].system:
            left[SEVERAL if len(raw.images) > 1 else HEARD if raw.sounds else TOLD] += 1
            continue
        left[LATER] += len(raw.turns) - 1
        rows.append(_row(raw, out / PICTURES, f"{number:06d}"))
    if not rows:
        raise UserError(f"{place}: expected samples with one question about one picture or none, got others only.")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / QUESTIONS_FILE).write_text(text, encoding="utf-8")
    return len(rows), +left


def _row(raw: RawSample, pictures: Path, name: str) -> dict[str, str]:
    turn = raw.turns[0]
    row = {"question_id": raw.key, "text": turn.human.replace(IMAGE_MARK, "").strip(), "answer": turn.gpt}
    for data in raw.images:
        row["image"] = f"{name}.{str(open_image(data, raw.origin).format).lower()}"
        (pictures / row["image"]).write_bytes(data)
    return row
