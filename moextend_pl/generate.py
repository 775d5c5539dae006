"""`python -m moextend_pl generate`: asks a trained model one question."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from moextend_pl.contracts import UserError

FORMATS = ("PNG", "JPEG", "WEBP")


def open_picture(path: Path) -> Image.Image:
    """Opens a picture.

    Args:
        path: A PNG, JPEG or WebP file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return Image.open(path, formats=FORMATS).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"Expected a picture at {path}, found no file. Correct `--image`.") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"Expected a whole picture ({', '.join(FORMATS)}) at {path}, Pillow says: {error}.") from error


def main(argv: Sequence[str]) -> int:
    """Prints the answer to one question.

    Args:
        argv: What follows `generate` on the command line.

    Returns:
        Exit code 0.

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
    from moextend_pl.module import MoExtend

    answer = MoExtend.load(options.checkpoint).generate(picture, options.prompt, options.task)
    sys.stdout.write(answer + "\n")
    return 0
