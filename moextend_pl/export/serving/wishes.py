"""What a request may wish for: a wish that nobody would fulfil is refused, and not passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from transformers import GenerationConfig

from moextend_pl.contracts import UserError

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

IDLE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "functions": ([],),
}
"""Fields that transformers' server passes over, and the values at which nothing is lost by that."""


def check_wishes(body: Mapping[str, Any]) -> None:
    """Refuses a request whose answer would not be the one that is asked for.

    Args:
        body: A request.

    Raises:
        UserError: If it asks for what nobody does, or for a length or a draw that is none.
    """
    for name, idle in IDLE.items():
        if body.get(name) is not None and body[name] not in idle:
            raise UserError(
                f"Expected a request without `{name}`, got {str(body[name])[:80]!r}: nothing here reads it."
            )
    if body.get("generation_config") is not None:
        _check_config(body["generation_config"])
    seed = body.get("seed")
    if seed is not None and type(seed) is not int:
        raise UserError(f"Expected `seed` as a whole number, got {seed!r}. Correct it or leave it out.")
    for name in LENGTHS:
        length = body.get(name)
        if length is not None and (type(length) is not int or length < 1):
            raise UserError(f"Expected `{name}` of at least 1, got {length!r}. Correct it or leave it out.")
    for name, fits, form in (
        ("temperature", lambda value: value >= 0, "0 or above"),
        ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
        ("frequency_penalty", lambda value: value > -1, "above -1"),
    ):
        value = body.get(name)
        if value is not None and not (type(value) in (int, float) and fits(value)):
            raise UserError(f"Expected `{name}` {form}, got {value!r}. Correct it or leave it out.")


def _check_config(text: Any) -> None:
    """Refuses what transformers' server would pass over, or fail at, in its own form of options."""
    try:
        config = json.loads(text)
    except (TypeError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"Expected `generation_config` as a text with a JSON object, got {str(text)[:80]!r}.")
    known = GenerationConfig().to_dict().keys() - {"num_return_sequences", "stop_strings"}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise UserError(f"Expected `generation_config` without `{unknown[0]}`: nothing here reads it. Leave it out.")


def stop_words(body: dict[str, Any]) -> list[str]:
    """Returns the words at which an answer ends.

    Raises:
        UserError: If they are no texts.
    """
    given = body.get("stop")
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"Expected `stop` as a text or a list of texts, got {str(given)[:40]!r}.")
    return [stop for stop in stops if stop]


def ended(response: JSONResponse, stops: list[str]) -> JSONResponse:
    """Returns a response whose texts end before the first stop word in them."""
    content = json.loads(bytes(response.body))
    for choice in content.get("choices", ()):
        holder, name = (choice["message"], "content") if "message" in choice else (choice, "text")
        text = holder.get(name) or ""
        end = min((place for place in map(text.find, stops) if place >= 0), default=None)
        if end is not None:
            holder[name], choice["finish_reason"] = text[:end], "stop"
    return JSONResponse(content, response.status_code)
