"""Requests that are too large are refused by one sentence, whatever is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Response

TOO_LARGE = 413


class SmallRequests:
    """Refuses requests that are too large, before they are read where they say so, and else as soon as they are.

    Args:
        app: What is asked.
        limit: Bytes.
        refusal: Makes the answer to such a request of a sentence and a status.
    """

    def __init__(self, app: Any, limit: int, refusal: Callable[[str, int], Response]) -> None:
        self.app, self.limit, self.refusal = app, limit, refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > self.limit:
            sentence = f"Expected a request of at most {self.limit} bytes, got {int(told)}. Shrink its pictures."
            await self.refusal(sentence, TOO_LARGE)(scope, receive, send)
            return
        got = 0

        async def counted() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.limit:
                raise HTTPException(TOO_LARGE, f"Expected a request of at most {self.limit} bytes, got more.")
            return message

        async def answer_with_reason(message: Any) -> None:
            # What reads the body calls every trouble with it a bad request.
            is_start = message["type"] == "http.response.start"
            await send({**message, "status": TOO_LARGE} if is_start and got > self.limit else message)

        await self.app(scope, counted, answer_with_reason)
