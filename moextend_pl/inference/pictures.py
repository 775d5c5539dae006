"""What a question names, from wherever: files, web and `data:` addresses; pictures are read as the data reads them."""

from __future__ import annotations

import base64
import binascii
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image

from moextend_pl.contracts import SampleSpec, UserError
from moextend_pl.samples.messages import Picture, Question
from moextend_pl.samples.pixels import PixelTransform, decode_image

MAX_BYTES = 20 * 2**20
"""Largest file that is fetched from an address."""

PATIENCE = 30.0
"""Seconds that fetching one may take in all."""

ACCEPTED = {"picture": "image/*", "sound": "audio/*"}
"""What a server is asked for, by what is expected of it."""

PIECE = 2**16
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")


def open_picture(picture: Picture) -> Image.Image:
    """Opens a picture, PNG, JPEG or WebP, as the data does: with the same limits and conversions.

    Args:
        picture: An image of Pillow, a file, an `https` address or a `data:` address.

    Raises:
        UserError: If it cannot be read, is too large, or takes too long to come.
    """
    if isinstance(picture, Image.Image):
        return picture
    return decode_image(*read_place(str(picture), "picture"))


def read_place(place: str, kind: str) -> tuple[bytes, str]:
    """Returns what lies at a place, and its name for messages.

    Args:
        place: A file, an `https` address or a `data:` address.
        kind: What is expected there, one of `ACCEPTED`.

    Raises:
        UserError: If it cannot be read, or is too large or slow to come.
    """
    if place.startswith("data:"):
        return _inline(place, kind), "the `data:` address"
    if "://" in place:
        return fetch(place, kind=kind), place
    try:
        return Path(place).read_bytes(), place
    except FileNotFoundError as error:
        raise UserError(f"Expected a {kind} at {place}, found no file. Correct the path.") from error
    except OSError as error:
        raise UserError(f"Expected a {kind} at {place}, got: {error.strerror}. Correct the path.") from error


def opened(questions: Sequence[Question], spec: SampleSpec) -> tuple[Sequence[Question], list[tuple[int, ...]]]:
    """Returns how many squares each picture of each question becomes; where they are cut, pictures have to be opened.

    Args:
        questions: Their pictures are places or images.
        spec: What the model asks of its data.

    Returns:
        The questions, with the pictures that were opened; and a number for each picture.

    Raises:
        UserError: See `open_picture`.
    """
    transform = PixelTransform(spec)
    if not transform.tiling.most:
        return questions, [(1,) * len(question.pictures) for question in questions]
    seen = [replace(q, pictures=tuple(open_picture(place) for place in q.pictures)) for q in questions]
    return seen, [tuple(transform.squares(open_picture(image)) for image in q.pictures) for q in seen]


def fetch(address: str, limit: int = MAX_BYTES, patience: float = PATIENCE, kind: str = "picture") -> bytes:
    """Fetches a file from the web.

    Args:
        address: `https`, or `http` on this machine; so is every address that it leads on to.
        limit: Largest size, in bytes.
        patience: Seconds that all of it may take.
        kind: What is expected there, one of `ACCEPTED`.

    Raises:
        UserError: If the address is of another kind, or the file does not come, is too large or too slow.
    """
    _check_address(address, kind)
    come: queue.Queue[bytes | Exception] = queue.Queue()
    # Beside this thread: a server may send its headers byte by byte, for which urllib knows no end.
    threading.Thread(target=_fetch, args=(address, kind, limit, patience, come), daemon=True, name=kind).start()
    try:
        found = come.get(timeout=patience)
    except queue.Empty as error:
        raise UserError(f"{address}: did not come within {patience:g} seconds. Fetch it yourself.") from error
    if isinstance(found, UserError):
        raise found
    if isinstance(found, Exception):
        raise UserError(
            f"{address}: cannot be fetched ({found}). Correct the address, or fetch it yourself."
        ) from found
    return found


def _fetch(address: str, kind: str, limit: int, patience: float, come: queue.Queue[bytes | Exception]) -> None:
    """Puts a file from the web into a queue, or what went wrong."""
    end, data = time.monotonic() + patience, bytearray()
    try:
        # Some hosts refuse the name that Python gives itself.
        request = Request(address, headers={"User-Agent": "moextend_pl", "Accept": ACCEPTED[kind]})
        with build_opener(_SafeRedirects(kind)).open(request, timeout=patience) as answer:
            while (piece := answer.read1(PIECE)) and time.monotonic() < end:  # later nobody waits for it
                data += piece
                if len(data) > limit:
                    raise UserError(f"{address}: expected a {kind} of at most {limit} bytes, got more. Shrink it.")
        come.put(bytes(data))
    except (OSError, HTTPException, ValueError) as error:
        come.put(error)


class _SafeRedirects(HTTPRedirectHandler):
    """Follows to addresses that could have been given in the first place."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Any:
        _check_address(newurl, self.kind)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(address: str, kind: str) -> None:
    parts = urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in THIS_MACHINE):
        raise UserError(
            f"Expected a {kind} as a file, an `https://` or a `data:` address, got {address[:80]!r}. Other kinds are "
            "never opened."
        )


def _inline(address: str, kind: str) -> bytes:
    """Returns what a `data:` address holds."""
    head, comma, body = address.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"Expected a `data:` address with a {kind} in base64, got: {error}. Correct it.") from error
