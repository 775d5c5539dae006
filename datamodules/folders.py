"""Folders of pictures as entries in LLaVA's form: a folder for each class, or a text of the same name beside each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from datamodules.foreign import CAPTION_QUESTION, MAX_TEXT_BYTES
from datamodules.shards import conversation, key_problem
from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_FORMATS, IMAGE_MARK

CLASS_QUESTION = "What is in the image?"
TEXT_SUFFIX = ".txt"
UNDESCRIBED = "pictures without a text of the same name"
UNSEEN = "texts without a picture of the same name"
UNKNOWN = "files of other kinds"


def read_folder(folder: Path, question: str | None) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Returns entries and how many files were left out, by what they are.

    With any same-named text the texts are the answers; else every picture lies in a folder, and the name of the
    first folder is its class (as in torchvision's ImageFolder), `_` read as a space.

    Args:
        folder: Where pictures lie, at any depth; hidden files are passed over.
        question: What every picture is asked; by the kind of folder if None.

    Raises:
        UserError: If there is no picture, or pictures lie beside each other without texts.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in IMAGE_FORMATS]
    texts = {path for path in files if path.suffix.lower() == TEXT_SUFFIX}
    if not pictures:
        raise UserError(
            f"Expected pictures ({', '.join(IMAGE_FORMATS)}) in {folder}, found {len(files)} other file(s). Give the "
            "folder that holds them."
        )
    left = Counter({UNKNOWN: len(files) - len(pictures) - len(texts)})
    told = {picture: picture.with_suffix(TEXT_SUFFIX) for picture in pictures}
    described = [picture for picture in pictures if told[picture] in texts]
    if described:
        left += Counter({UNDESCRIBED: len(pictures) - len(described)})
        left += Counter({UNSEEN: len(texts - {told[picture] for picture in described})})
        pairs = [(picture, _content(told[picture])) for picture in described]
        return [_entry(picture, folder, question or CAPTION_QUESTION, text) for picture, text in pairs], +left
    flat = next((picture for picture in pictures if picture.parent == folder), None)
    if flat is not None:
        raise UserError(
            f"{folder}: expected a folder for each class, or a text `{flat.stem}{TEXT_SUFFIX}` beside `{flat.name}`; "
            "got neither. Write the texts, or sort the pictures into folders."
        )
    left += Counter({UNSEEN: len(texts)})
    classes = [(picture, picture.relative_to(folder).parts[0].replace("_", " ")) for picture in pictures]
    return [_entry(picture, folder, question or CLASS_QUESTION, name) for picture, name in classes], +left


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


def _content(path: Path) -> str:
    """Reads a text as an answer, where no image belongs; an empty one is a mistake that is told with its entry."""
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_TEXT_BYTES).decode("utf-8-sig").replace(IMAGE_MARK, "").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8, got bytes that fail: {error}. Save it as UTF-8.") from error


def _entry(picture: Path, folder: Path, question: str, answer: str) -> dict[str, Any]:
    name = picture.relative_to(folder)
    key = str(name.with_suffix("")).replace(".", "_")
    asked = question if IMAGE_MARK in question else f"{IMAGE_MARK}\n{question}"
    # A name too long for a key is told by its number instead.
    return {"id": None if key_problem(key) else key, "image": str(name), "conversations": conversation((asked, answer))}
