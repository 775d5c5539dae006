"""Messages with pictures, as transformers and OpenAI write them, to conversations as the data has them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers.image_transforms import to_pil_image

from moextend_pl.contracts import Sample, UserError
from moextend_pl.samples.conversation import ConversationEncoder
from moextend_pl.samples.pixels import decode_image
from moextend_pl.samples.turns import IMAGE_MARK, Turn

UNKNOWN_ANSWER = "?"
PLACES = ("image", "image_url", "url", "path")
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: As chat templates take them; `<image>` stands for each picture.
        pictures: In the order of their marks.
        asks: Whether an answer is to follow.
    """

    messages: list[dict[str, str]]
    pictures: list[Any]
    asks: bool

    def encode(self, encoder: ConversationEncoder, pixels: Tensor) -> Sample:
        """Encodes the conversation as the data is, up to the next answer where one is to follow."""
        texts = [message["content"] for message in self.messages]
        system = texts.pop(0) if self.messages[0]["role"] == SYSTEM else ""
        texts += [UNKNOWN_ANSWER] if self.asks else []
        turns = [Turn(*pair, "") for pair in zip(texts[::2], texts[1::2], strict=True)]
        turns[0] = Turn(turns[0].human, turns[0].gpt, system)
        names = [str(number) for number in range(len(self.pictures))]
        encode = encoder.encode_prompt if self.asks else encoder.encode
        return encode("the conversation", tuple(turns), list(pixels), names)


def read_messages(messages: Any, asks: bool) -> Chat:
    """Reads a conversation.

    Args:
        messages: `system` (optional), then `user` and `assistant` in turn.
        asks: Whether an answer is to follow.

    Raises:
        UserError: If it is no such conversation.
    """
    pictures: list[Any] = []
    read = [{"role": str(message.get("role")), "content": _content(message, pictures)} for message in messages]
    roles = [message["role"] for message in read]
    spoken = roles[1:] if roles[:1] == [SYSTEM] else roles
    if spoken != [(USER, ASSISTANT)[n % 2] for n in range(len(spoken))] or len(spoken) % 2 != asks or not spoken:
        raise UserError(
            f"Expected messages of {SYSTEM} (optional), then {USER} and {ASSISTANT} in turn, "
            f"{USER if asks else ASSISTANT} last, got {roles}."
        )
    return Chat(read, pictures, asks)


def _content(message: Mapping[str, Any], pictures: list[Any]) -> str:
    """Returns the text of a message with a mark for each picture, which it adds to a list; each part is a line."""
    content, lines = message.get("content"), []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or [{}]:
        if part.get("type") == "text" and isinstance(part.get("text"), str) and IMAGE_MARK not in part["text"]:
            lines.append(part["text"])
        elif part.get("type") in ("image", "image_url") and message.get("role") == USER:
            place = next((part[name] for name in PLACES if part.get(name) is not None), None)
            pictures.append(place.get("url") if isinstance(place, Mapping) else place)
            lines.append(IMAGE_MARK)
        else:
            raise UserError(
                f"Expected parts of the types 'text' (without {IMAGE_MARK}) and, from {USER}, 'image', got "
                f"{str(part)[:80]!r} from {message.get('role')!r}."
            )
    return "\n".join(lines)


def batched(given: Any) -> list[Any]:
    """Returns a list as it is, and anything else as a list of one."""
    return list(given) if isinstance(given, list | tuple) else [given]


def as_picture(given: Any) -> Image.Image:
    """Returns a picture.

    Args:
        given: A picture of Pillow, an array or a tensor, bytes of a file, a path or a `data:` address.

    Raises:
        UserError: If it is none of these, or cannot be read.
    """
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, bytes):
        return decode_image(given, "the picture")
    if not isinstance(given, str | Path):
        picture: Image.Image = to_pil_image(given)
        return picture
    place = str(given)
    try:
        if place.startswith("data:"):
            return decode_image(base64.b64decode(place.partition(",")[2], validate=True), "the `data:` address")
        return decode_image(Path(place).read_bytes(), place)
    except (binascii.Error, OSError) as error:
        raise UserError(f"Expected a picture at {place[:80]!r}, got: {error}. Correct it.") from error
