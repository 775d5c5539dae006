"""`python -m moextend_pl chat`: a conversation with a trained model, in a terminal or from standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from moextend_pl.cli.generate import add_options, generation_options, load_model
from moextend_pl.contracts import UserError

if TYPE_CHECKING:
    from moextend_pl.inference.chat import Chat

HELP = """\
Each line is a question. /image PLACE shows a picture with the next question: a file or an https address.
/new begins a new conversation, /quit ends.
"""


def main(argv: Sequence[str]) -> int:
    """Talks until the input ends.

    Raises:
        UserError: If the run cannot be read or an option cannot be used; and for every mistake in a question, unless
            a person at a terminal can put it right.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl chat", description="Talks with a trained model.\n" + HELP
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser)
    parser.add_argument("--system", default="", help="instruction that stands before the first question")
    options = parser.parse_args(argv)
    how = generation_options(options)
    model = load_model(options)
    from moextend_pl.inference.chat import Chat

    chat = Chat(model, options.task, options.system, **how)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        sys.stdout.write(HELP)
    converse(chat, _typed() if at_terminal else sys.stdin, sys.stdout, options.image, forgiving=at_terminal)
    return 0


def converse(chat: Chat, lines: Iterable[str], out: TextIO, pictures: Sequence[str], forgiving: bool) -> None:
    """Answers line by line.

    Args:
        chat: The conversation.
        lines: Questions and commands.
        out: Where answers are written.
        pictures: Places of what is shown with the first question.
        forgiving: Whether a mistake is told and the next line read; else it ends the conversation.

    Raises:
        UserError: For a mistake, if it is not forgiven.
    """
    shown = list(pictures)
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/image":
                shown += _existing(rest.strip())
            elif command == "/new":
                chat.begin_anew()
                shown = []
            elif command.startswith("/"):
                raise UserError(f"There is no command {command}; choose one of /image PLACE, /new, /quit.")
            elif line:
                _answer(chat, line, shown, out)
                shown = []
        except UserError as error:
            if not forgiving:
                raise
            out.write(f"error: {error}\n")
        except KeyboardInterrupt:
            if not forgiving:
                raise
            out.write("\n")  # an answer is cut short; the conversation goes on


def _answer(chat: Chat, text: str, shown: Sequence[str], out: TextIO) -> None:
    for piece in chat.ask(text, shown):
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()


def _existing(place: str) -> list[str]:
    """Returns a picture's place, if it can be opened."""
    from moextend_pl.inference.pictures import open_picture

    open_picture(place)
    return [place]


def _typed() -> Iterator[str]:
    """Yields what a person types, until the end of the input."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            return
