"""`python -m moextend_pl generate`: asks a trained model one question."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Prints the answer to one question.

    Raises:
        UserError: If the run or a picture cannot be read, or the model was extended for other tasks.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl generate", description="Asks a trained model.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory with manifest.json and delta")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        help="pictures to ask about, files or https addresses; left out for a question about text alone",
    )
    parser.add_argument("--task", default="", help="task of the question, where the model was extended for several")
    options = parser.parse_args(argv)
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.inference.pictures import open_picture

    pictures = [open_picture(place) for place in options.image]
    from moextend_pl.models.moextend import MoExtend

    answer = MoExtend.load(options.checkpoint).generate(pictures, options.prompt, options.task)
    sys.stdout.write(f"{answer}\n")
    return 0
