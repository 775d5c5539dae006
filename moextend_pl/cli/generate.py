"""`python -m moextend_pl generate`: asks a trained model one question."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moextend_pl.contracts import UserError

if TYPE_CHECKING:
    from PIL import Image


def open_picture(path: Path) -> Image.Image:
    """Opens a picture, PNG, JPEG or WebP, as the data does: with the same limits and conversions.

    Raises:
        UserError: If it cannot be read, or is too large.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"Expected a picture at {path}, found no file. Correct `--image`.") from error
    except OSError as error:
        raise UserError(f"Expected a picture at {path}, got: {error.strerror}. Correct `--image`.") from error
    # Imported only where there is a file, because it takes seconds.
    from moextend_pl.samples.pixels import decode_image

    return decode_image(data, str(path))


def main(argv: Sequence[str]) -> int:
    """Prints the answer to one question.

    Raises:
        UserError: If the run or the picture cannot be read, or the model was extended for other tasks.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl generate", description="Asks a trained model.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory with manifest.json and delta")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--image", type=Path, help="picture to ask about; left out for a question about text alone")
    parser.add_argument("--task", default="", help="task of the question, where the model was extended for several")
    options = parser.parse_args(argv)
    picture = open_picture(options.image) if options.image else None
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.models.moextend import MoExtend

    answer = MoExtend.load(options.checkpoint).generate(picture, options.prompt, options.task)
    sys.stdout.write(answer + "\n")
    return 0
