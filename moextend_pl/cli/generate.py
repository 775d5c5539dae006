"""`python -m moextend_pl generate`: asks a trained model one question."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moextend_pl.models.moextend import MoExtend

GENERATION: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "longest answer, in tokens"),
    "temperature": (float, "above 0, tokens are drawn; by default the most probable one is taken"),
    "top_k": (int, "draw among this many tokens"),
    "top_p": (float, "draw among the most probable tokens that have this probability together"),
    "beams": (int, "how many beginnings of an answer are followed at a time"),
    "seed": (int, "of what is drawn"),
    "reduce": (str, "aim: answer from fewer picture tokens; or aim:L1,L2[,ROUNDS], aim_merge[:ROUNDS]"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `generate` and `chat` are both told: whom to ask, about what, and how answers are generated."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory with manifest.json and delta")
    parser.add_argument("--base", type=Path, help="folder of the run's language model, where that was moved")
    parser.add_argument("--tower", type=Path, help="folder of the run's vision tower, where that was moved")
    parser.add_argument("--task", default="", help="task of the questions, where the model was extended for several")
    pictures = "picture to ask about: PNG, JPEG or WebP, a file or an https address; several are shown in their order"
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="PLACE", help=pictures)
    sounds = "sound to ask about, of a model that hears: WAV, FLAC or MP3, a file or an https address"
    parser.add_argument("--sound", nargs="+", action="extend", default=[], metavar="PLACE", help=sounds)
    for name, (kind, text) in GENERATION.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--stop", nargs="+", action="extend", metavar="TEXT", help="an answer ends before this text")


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what was said of generation.

    Raises:
        UserError: If it cannot be used.
    """
    from moextend_pl.inference.spec import GenerationSpec

    given = {name: getattr(options, name) for name in (*GENERATION, "stop")}
    said = {name: value for name, value in given.items() if value is not None}
    GenerationSpec().with_options(said)  # a mistake is told before a model is loaded
    return said


def load_model(options: argparse.Namespace) -> MoExtend:
    """Loads the model that is asked.

    Raises:
        UserError: If it cannot be loaded.
    """
    import moextend_pl

    return moextend_pl.load(options.checkpoint, options.base, options.tower)


def main(argv: Sequence[str]) -> int:
    """Prints the answer to one question; on a terminal piece by piece.

    Raises:
        UserError: If the run, a picture or a sound cannot be read, an option cannot be used, or the model was extended
            for other tasks.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl generate", description="Asks a trained model.")
    add_options(parser)
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--json", action="store_true", help="print one line of JSON: question, answer, seconds")
    options = parser.parse_args(argv)
    how = generation_options(options)
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.inference.pictures import open_picture
    from moextend_pl.inference.sounds import open_sound

    pictures = [open_picture(place) for place in options.image]
    sounds = [open_sound(place)[0] for place in options.sound]
    model = load_model(options)
    begun = time.monotonic()
    if sys.stdout.isatty() and not options.json and how.get("beams", 1) == 1:
        for piece in model.generate(pictures, options.prompt, options.task, sounds=sounds, stream=True, **how):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0
    answer = model.generate(pictures, options.prompt, options.task, sounds=sounds, **how)
    asked = {"prompt": options.prompt, "images": options.image, "sounds": options.sound, "task": options.task}
    told = {**asked, **how, "answer": answer}
    seconds = round(time.monotonic() - begun, 3)
    sys.stdout.write((json.dumps({**told, "seconds": seconds}) if options.json else str(answer)) + "\n")
    return 0
