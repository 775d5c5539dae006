"""`python -m moextend_pl merge`: a delta and its base to a whole model, which transformers loads."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.export.command import HF, TARGETS, add_model_options, check_new, write_whole_model

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Joins a delta to its base.

    Raises:
        UserError: For every mistake that the user can mend, a base that is not the delta's among them.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl merge", description="Joins a delta to its base.")
    parser.add_argument("delta", help="folder of the delta, or org/name in a hub")
    parser.add_argument("--base", default="", help="folder of the base; by default it is found by its name")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    add_model_options(parser)
    options = parser.parse_args(argv)
    check_new(options.out)
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.runs.named import find_run

    write_whole_model(options, find_run(options.delta))
    log.info("%s holds %s", options.out, TARGETS[HF])
    return 0
