"""`python -m moextend_pl chat`: a conversation with a trained model, in a terminal or from standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from moextend_pl.cli.generate import add_options, generation_options, load_model
from moextend_pl.contracts import UserError

if TYPE_CHECKING:
    from moextend_pl.inference.chat import Chat

HELP = """\
Each line is a question. /image PLACE shows a picture with the next question: a file or an https address.
/sound PLACE lets a model that hears hear one with it.
/new begins a new conversation, /quit ends.
"""
COMMANDS = "/image PLACE, /sound PLACE, /new, /quit"


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
    lines = _typed() if at_terminal else sys.stdin
    converse(chat, lines, sys.stdout, (options.image, options.sound), forgiving=at_terminal)
    return 0


def converse(
    chat: Chat, lines: Iterable[str], out: TextIO, first: tuple[Sequence[str], Sequence[str]], forgiving: bool
) -> None:
    """Answers line by line.

    Args:
        chat: The conversation.
        lines: Questions and commands.
        out: Where answers are written.
        first: Places of the pictures and of the sounds that come with the first question.
        forgiving: Whether a mistake is told and the next line read; else it ends the conversation.

    Raises:
        UserError: For a mistake, if it is not forgiven.
    """
    shown, heard = map(list, first)
    coming = {"/image": shown, "/sound": heard}
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command in coming:
                coming[command].append(_usable(chat, command, rest.strip()))
            elif command == "/new":
                chat.begin_anew()
                _forget(coming)
            elif command.startswith("/"):
                raise UserError(f"There is no command {command}; choose one of {COMMANDS}.")
            elif line:
                _answer(chat.ask(line, shown, heard), out)
                _forget(coming)
        except UserError as error:
            if not forgiving:
                raise
            out.write(f"error: {error}\n")
        except KeyboardInterrupt:
            if not forgiving:
                raise
            out.write("\n")  # an answer is cut short; the conversation goes on


def _answer(pieces: Iterable[str], out: TextIO) -> None:
    for piece in pieces:
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()


def _forget(coming: Mapping[str, list[str]]) -> None:
    for places in coming.values():
        places.clear()


def _usable(chat: Chat, command: str, place: str) -> str:
    """Returns the place of a picture or sound that can be read: a question with another would never be answered."""
    from moextend_pl.inference.pictures import open_picture
    from moextend_pl.inference.sounds import check_sound

    if not place:
        raise UserError(f"Expected a file or an https address after {command}, got nothing. Name one.")
    if command == "/image":
        open_picture(place)
    else:
        check_sound(place, chat.model.sample_spec())
    return place


def _typed() -> Iterator[str]:
    """Yields what a person types, until the end of the input."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            return
