"""The texts of a sample: LLaVA's conversations, or the captions of shards that others wrote.

Plain WebDataset keeps a caption in KEY.txt; img2dataset (https://github.com/rom1504/img2dataset) does so too, and
adds KEY.json with facts, of which `caption` is one. Both become a question with the caption as its answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moextend_pl.contracts import UserError
from moextend_pl.samples.turns import IMAGE_MARK, video_problem

CAPTION_QUESTION = "Describe the image."
MAX_TEXT_BYTES = 16 * 2**20
"""Largest text of a sample; what is larger is no conversation."""


def conversations_of(texts: Mapping[str, bytes], images: int, origin: str) -> list[dict[str, str]]:
    """Returns the conversation of a sample as LLaVA writes it, not yet checked turn by turn.

    Args:
        texts: `json` and `txt`, whichever the sample has.
        images: How many images the sample has.
        origin: Name of shard and sample, for the error message.

    Raises:
        UserError: If there is no text, or it is no strict UTF-8, no JSON, or holds neither conversation nor caption.
    """
    content = _parse(texts["json"], origin) if "json" in texts else {}
    if video := video_problem(content):
        raise UserError(f"{origin}: {video}. Leave the sample out.")
    if "conversations" in content or not (content or "txt" in texts):
        conversations = content.get("conversations")
        if not isinstance(conversations, list):
            found = "no KEY.json and no KEY.txt" if not texts else f"`conversations`: {type(conversations).__name__}"
            raise UserError(f"{origin}: expected a list `conversations`, or a caption; got {found}.")
        return conversations
    caption = _decode(texts["txt"], origin) if "txt" in texts else content.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{origin}: expected `conversations` or a caption, got the caption {str(caption)[:40]!r}.")
    if not images:
        raise UserError(f"{origin}: expected an image with the caption, got none. Leave the sample out.")
    question = f"{IMAGE_MARK}\n" * images + CAPTION_QUESTION
    # A caption is an answer, where no image belongs.
    answer = caption.strip().replace(IMAGE_MARK, "")
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _parse(data: bytes, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(_decode(data, origin))
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin}: expected JSON with `conversations`, got bytes that fail: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{origin}: expected a JSON object with `conversations`, got {type(content).__name__}.")
    return content


def _decode(data: bytes, origin: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"{origin}: expected at most {MAX_TEXT_BYTES} bytes of text, got {len(data)}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: expected UTF-8, got bytes that fail: {error}.") from error
