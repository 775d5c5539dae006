"""An answer piece by piece, as it is generated: pieces joined are the answer."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

NOT_SETTLED = re.compile(r"[\s\ufffd]+$")
"""White space, and what stands for a character of which not all bytes are there yet."""


def cut(text: str, stop: Sequence[str]) -> str:
    """Returns a text up to the first stop word in it."""
    ends = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def settled(text: str, stop: Sequence[str]) -> str:
    """Returns what of an answer stays as it is, whatever comes next.

    Neither half a character nor the beginning of a stop word does, nor white space that may be at the end.

    Args:
        text: The answer so far.
        stop: Its stop words.

    Example:
        >>> settled("a cat. St", ["Stop"])
        'a cat.'
    """
    whole = cut(text, stop)
    if whole == text:
        whole = NOT_SETTLED.sub("", text)
        begun = [size for word in stop for size in range(1, len(word)) if whole.endswith(word[:size])]
        whole = NOT_SETTLED.sub("", whole[: len(whole) - max(begun, default=0)])
    return whole.strip()


class Pieces(BaseStreamer):
    """Hears tokens from `generate` and tells the text that they add.

    Args:
        tokenizer: Turns tokens into text.
        stop: Stop words, which are not told.
        heard: Is given each piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], heard: Callable[[str], None]) -> None:
        self.tokenizer, self.stop, self.heard = tokenizer, stop, heard
        self.tokens: list[int] = []
        self.told = ""

    def put(self, value: Tensor) -> None:
        """Takes the next tokens of the only row."""
        self.tokens += value.flatten().tolist()
        self._tell(settled(self._text(), self.stop))

    def end(self) -> None:
        """Tells the rest."""
        self._tell(cut(self._text(), self.stop).strip())

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        # Also where nothing is new, so that who gave up is noticed at the next token.
        self.heard(text[len(self.told) :])
        self.told = max(self.told, text, key=len)


class _GivenUpError(Exception):
    """Nobody listens any more."""


def stream(work: Callable[[Callable[[str], None]], object]) -> Iterator[str]:
    """Yields what a piece of work tells while it is done in a thread of its own.

    Args:
        work: Is given the function to tell with. The function ends the work when nobody listens any more.

    Yields:
        What it tells, but for empty texts.

    Raises:
        Exception: Whatever the work raises.
    """
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    gone, failed = threading.Event(), []

    def tell(text: str) -> None:
        if gone.is_set():
            raise _GivenUpError
        told.put(text)

    def run() -> None:
        try:
            work(tell)
        except _GivenUpError:
            pass
        except BaseException as error:  # belongs to whoever listens
            failed.append(error)
        finally:
            told.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (text := told.get()) is not None:
            if text:
                yield text
    finally:
        gone.set()
        thread.join()
    if failed:
        raise failed[0]
