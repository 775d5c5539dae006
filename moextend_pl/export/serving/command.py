"""`python -m moextend_pl serve`: answers questions over HTTP as OpenAI's interface asks them."""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from moextend_pl.contracts import UserError

log = logging.getLogger(__name__)

MEGABYTE = 2**20


def main(argv: Sequence[str]) -> int:
    """Serves until it is interrupted.

    Raises:
        UserError: If the run cannot be loaded, its address is not free, or the extra `serve` is not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m moextend_pl serve", description="Serves a model over HTTP.")
    parser.add_argument("run", help="run directory, exported folder, delta folder, or org/name of one in a hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; by default this machine alone")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", default="", help="name of the model in requests; by default that of the folder")
    parser.add_argument("--base", default="", help="where the base lies, if not where the run says")
    parser.add_argument("--task", default="", help="task of all questions, where the model was extended for several")
    parser.add_argument("--device", default="auto", help="for example cpu or cuda:0; auto takes a GPU if there is one")
    parser.add_argument("--max-megabytes", type=float, default=20.0, help="largest request, pictures included")
    options = parser.parse_args(argv)
    if not options.max_megabytes > 0:
        raise UserError(f"Expected `--max-megabytes` above 0, got {options.max_megabytes}. Raise it.")
    check_address(options.host, options.port)
    try:
        from moextend_pl.export.serving import server
    except ImportError as error:
        raise UserError(
            f"`serve` needs fastapi, uvicorn and openai, and a transformers with a server ({error}): pip install "
            '"moextend_pl[serve]".'
        ) from error
    # Imported when the arguments are known to be right: it takes seconds.
    from moextend_pl.runs.named import find_run

    run = find_run(options.run)
    model, processor = server.read(run, options.base or None, options.task, options.device)
    name = options.name or Path(options.run).resolve().name
    app = server.build(name, model, processor, int(options.max_megabytes * MEGABYTE))
    log.info("%s at http://%s:%d/v1", name, options.host, options.port)
    server.run(app, options.host, options.port)
    return 0


def check_address(host: str, port: int) -> None:
    """Refuses an address at which this machine cannot listen, before a model is loaded.

    Raises:
        UserError: If it is none of this machine, or another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port < 1:
            raise OverflowError("port must be 1-65535")
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"Expected an address to listen at, got {host}:{port} ({error}). Name another `--port` or `--host`."
        ) from error
