"""`python -m moextend_pl demo`: a web page to talk with a trained model."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError
from moextend_pl.export.serving.command import MEGABYTE, check_address

log = logging.getLogger(__name__)

EXAMPLES = 6
UPLOADS = "GRADIO_TEMP_DIR"


def main(argv: Sequence[str]) -> int:
    """Shows the page until it is interrupted.

    Raises:
        UserError: If the run cannot be loaded, its address is not free, or the extra `demo` is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moextend_pl demo",
        description="Shows a web page to talk with a model: beside each answer, the experts that it took and what the "
        "base alone says.",
    )
    add = parser.add_argument
    add("run", help="run directory, delta folder, or org/name of one in a hub")
    add("--host", default="127.0.0.1", help="address to listen at; by default this machine alone")
    add("--port", type=int, default=7860)
    add("--base", help="where the base lies, if not where the run says")
    add("--tower", help="where the vision tower lies, likewise")
    add("--task", default="", help="task of all questions, where the model was extended for several")
    add("--device", default="auto", help="for example cpu or cuda:0; auto takes a GPU if there is one")
    add("--max-new-tokens", type=int, help="longest answer, in tokens")
    add("--max-megabytes", type=float, default=20.0, help="largest upload")
    options = parser.parse_args(argv)
    if not options.max_megabytes > 0:
        raise UserError(f"Expected `--max-megabytes` above 0, got {options.max_megabytes}. Raise it.")
    check_address(options.host, options.port)
    # What people upload ends with the page; gradio asks for the place when it is imported, and later.
    with tempfile.TemporaryDirectory(prefix="moextend_demo_") as folder:
        os.environ[UPLOADS] = folder
        _show(options, Path(folder))
    return 0


def _show(options: argparse.Namespace, folder: Path) -> None:
    try:
        from moextend_pl.export.demo import page
    except ImportError as error:
        raise UserError(f'`demo` needs gradio ({error}): pip install "moextend_pl[demo]".') from error
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.export.demo.answers import Demonstration
    from moextend_pl.export.demo.samples import run_samples
    from moextend_pl.inference.device import named_device
    from moextend_pl.models.moextend import MoExtend
    from moextend_pl.runs.named import find_run

    run, device = find_run(options.run), named_device(options.device)
    how = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    demonstration = Demonstration(MoExtend.load(run, options.base, options.tower).to(device), options.task, **how)
    samples = []
    for number, sample in enumerate(run_samples(run, EXAMPLES)):
        place = folder / f"{number}_{sample.name}"
        place.write_bytes(sample.picture)
        samples.append((sample, place))
    shown = page.build(demonstration, Path(options.run).resolve().name, samples)
    log.info("%s at http://%s:%d", options.run, options.host, options.port)
    page.serve(shown, options.host, options.port, int(options.max_megabytes * MEGABYTE))
