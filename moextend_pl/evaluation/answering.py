"""Asks a model the questions of a set and keeps what it says, so that scores can be made again without it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moextend_pl.contracts import UserError
from moextend_pl.evaluation.metrics.keyed import Record
from moextend_pl.evaluation.question import Question, read_lines
from moextend_pl.evaluation.ranks import Answers, Ranks
from moextend_pl.runs.atomic import read_json, write_json
from moextend_pl.runs.fingerprints import file_sha256

if TYPE_CHECKING:
    from PIL import Image

    from moextend_pl.models.moextend import MoExtend

PREDICTIONS, ASKED = "predictions.jsonl", "asked.json"
DATA_ADDRESS = "data:"


def check_pictures(questions: Sequence[Question], task: str) -> None:
    """Refuses a set that lacks pictures, before a model is loaded.

    Raises:
        UserError: If one is not there.
    """
    places = dict.fromkeys(q.picture for q in questions if q.picture and not q.picture.startswith(DATA_ADDRESS))
    missing = [place for place in places if not Path(place).is_file()]
    if missing:
        raise UserError(
            f"Expected the pictures of {task}, found no file for {len(missing)} of {len(places)}, for example "
            f"{missing[0]}. Unpack them there."
        )


def picture_of(question: Question) -> Image.Image | None:
    """Returns the picture of a question, read as the data reads it.

    Raises:
        UserError: If it cannot be read.
    """
    from moextend_pl.samples.pixels import decode_image

    if not question.picture:
        return None
    if question.picture.startswith(DATA_ADDRESS):
        try:
            return decode_image(base64.b64decode(question.picture.partition(",")[2], validate=True), question.key)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{question.key}: expected a picture in base64, got text that fails: {error}.") from error
    return decode_image(Path(question.picture).read_bytes(), question.picture)


def model_facts(run: Path) -> dict[str, str]:
    """Returns what tells one trained model from another."""
    return {name: file_sha256(run / name) for name in ("manifest.json", "delta.safetensors") if (run / name).is_file()}


def answers_of(model: MoExtend, task: str = "", reduce: str | None = None) -> Answers:
    """Returns a function that asks a model.

    Args:
        model: Ready to be asked.
        task: Name of the model's task, where it was extended for several.
        reduce: How picture tokens become fewer, see `Reduction.parse`.
    """

    def answers(questions: Sequence[Question]) -> list[str]:
        pictures, prompts = [picture_of(q) for q in questions], [q.prompt for q in questions]
        found = model.generate(pictures, prompts, task, batch_size=len(questions), reduce=reduce)
        assert isinstance(found, list)
        return found

    return answers


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Returns the kept answers of a folder, first ones first, without a last line that was cut off by a kill.

    Raises:
        UserError: If there are none.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        raise UserError(f"Expected kept answers at {path}, found no file. Run `evaluate` first.")
    return list(read_lines(path, whole_lines(path)))


def whole_lines(path: Path) -> int:
    """Returns how many bytes of a file are lines that were written to their end."""
    return path.read_bytes().rfind(b"\n") + 1


def picture_facts(question: Question) -> str:
    """Returns a digest of the picture of a question; empty without one."""
    if question.picture.startswith(DATA_ADDRESS) or not question.picture:
        return hashlib.sha256(question.picture.encode()).hexdigest() if question.picture else ""
    return file_sha256(Path(question.picture))


def records(rows: Sequence[dict[str, Any]]) -> list[Record]:
    """Returns kept answers as metrics take them."""
    return [{"key": row["key"], "prediction": row["prediction"], "truth": row["truth"]} for row in rows]


def ask(
    questions: Sequence[Question],
    folder: Path,
    facts: dict[str, Any],
    answers: Answers,
    batch_size: int,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Returns the answers to all questions; those that the folder keeps already are not asked again.

    Args:
        questions: Of one task.
        folder: Of the task in the run; `predictions.jsonl` grows batch by batch.
        facts: What decides the answers; a folder with others is refused.
        answers: Asks the model.
        batch_size: Questions that one process answers at a time.
        ranks: The processes that answer together; the first one reads and writes, and only it has what was kept.

    Raises:
        UserError: If the folder keeps answers of another model, or to other questions.
    """
    ranks = ranks or Ranks()
    kept = _kept(questions, folder, facts) if ranks.rank == 0 else {}
    done = set(ranks.from_first(list(kept)))
    left = [question for question in questions if question.key not in done]
    shared = ranks.together(answers, batch_size)
    place = folder / PREDICTIONS if ranks.rank == 0 else Path(os.devnull)
    with (
        place.open("a", encoding="utf-8") as file,
        tqdm(total=len(left), desc=folder.name, disable=ranks.rank > 0) as bar,
    ):
        for first in range(0, len(left), batch_size * ranks.size):
            batch = left[first : first + batch_size * ranks.size]
            for question, text in zip(batch, shared(batch), strict=True):
                kept[question.key] = _row(question, text)
                file.write(json.dumps(kept[question.key]) + "\n")
            file.flush()
            bar.update(len(batch))
    return [kept[question.key] for question in questions if question.key in kept]


def _kept(questions: Sequence[Question], folder: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the answers that a folder keeps, by key, and makes it ready for more."""
    kept = {row["key"]: row for row in read_predictions(folder)} if (folder / PREDICTIONS).is_file() else {}
    if kept and read_json(folder / ASKED) != facts:
        raise UserError(
            f"{folder} keeps answers of another model, of this one before it was trained again, or by another --task "
            "or --reduce. Remove it, or name another folder by --out."
        )
    changed = [q.key for q in questions if q.key in kept and _asked(kept[q.key]) != _asked(_row(q, ""))]
    if changed:
        raise UserError(
            f"{folder} keeps answers to other prompts, pictures or truths, for example of {changed[0]}. Remove it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PREDICTIONS).is_file():  # a line that was cut off must not be joined by the next
        os.truncate(folder / PREDICTIONS, whole_lines(folder / PREDICTIONS))
    write_json(folder / ASKED, facts)
    return kept


def _row(question: Question, prediction: str) -> dict[str, Any]:
    told = {"key": question.key, "prompt": question.prompt, "prediction": prediction, "truth": question.truth}
    row: dict[str, Any] = json.loads(json.dumps({**told, "picture": picture_facts(question)}))  # as it is read again
    return row


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "prediction"}
