"""`python -m moextend_pl slurm`: the batch script of a stage, filled in."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence

from moextend_pl.cli.config_files import prepare_arguments
from moextend_pl.cli.recipes import HOME
from moextend_pl.contracts import UserError

TEMPLATE = HOME / "slurm" / "train.sbatch"
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
USAGE = "if [ $# -eq 0 ]; then\n"
SEED_OPTIONS = '--seed_everything "$SLURM_ARRAY_TASK_ID" --trainer.default_root_dir {}/seed_"$SLURM_ARRAY_TASK_ID"'
DESCRIPTION = """\
Prints a batch script that trains a stage; every option it does not know is one of `fit`. Save it, read it, and give it
to sbatch. The job is queued again when its time is up or it is preempted, and goes on where it was.
"""


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's own options; all others are those of `fit`."""
    name = "python -m moextend_pl slurm"
    parser = argparse.ArgumentParser(prog=name, description=DESCRIPTION, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("--config", action="append", default=[], help="stage file, as for `fit`")
    add("--nodes", type=int, default=1, help="machines (default %(default)s)")
    add("--gpus-per-node", type=int, default=0, help="GPUs of each, with one process each; 0 trains on the CPU")
    add("--cpus-per-task", type=int, help="cores for the data workers of each process")
    add("--time", help="of one start, for example 04:00:00; a longer run takes several")
    add("--grace", type=int, default=120, help="seconds before its end in which a step and a checkpoint have room")
    add("--partition", help="queue of the cluster")
    add("--account", help="who pays")
    add("--job-name", help="for the listing")
    add("--seeds", type=int, nargs="+", help="an array with a run for each seed, in `seed_N` of --out")
    add("--out", help="folder of the runs of --seeds")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prints the script.

    Raises:
        UserError: For mistakes in the options, or a config that is not there.
    """
    try:
        options, rest = options_parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from error
    sys.stdout.write(script(options, rest))
    return 0


def script(options: argparse.Namespace, rest: Sequence[str]) -> str:
    """Returns the template with the options in their places.

    Args:
        options: Of this command.
        rest: Of `fit`.

    Raises:
        UserError: If they do not fit together, or a config is not there.
    """
    _check(options)
    prepare_arguments(["fit", *(word for path in options.config for word in ("--config", path)), *rest])
    lines = {
        "job-name": options.job_name,
        "nodes": options.nodes,
        "ntasks-per-node": max(1, options.gpus_per_node),
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "signal": f"USR1@{options.grace}",
        "partition": options.partition,
        "account": options.account,
        "array": ",".join(map(str, options.seeds)) if options.seeds else None,
        "output": "slurm-%A_%a.out" if options.seeds else None,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in lines.items():
        text = _set(text, name, value)
    first, *others = options.config
    words = shlex.join([first, *(word for path in others for word in ("--config", path)), *rest])
    if options.seeds:
        words += " " + SEED_OPTIONS.format(shlex.quote(options.out))
    return text.replace(USAGE, f"{USAGE}    set -- {words}\nfi\n{USAGE}", 1)


def _set(text: str, name: str, value: object) -> str:
    """Writes a line for sbatch: in its place if the template has one, else before the first of them."""
    if value is None:
        return text
    line, there = f"#SBATCH --{name}={value}\n", re.compile(rf"^#SBATCH --{name}=.*\n", re.MULTILINE)
    return there.sub(line, text) if there.search(text) else text.replace("#SBATCH", f"{line}#SBATCH", 1)


def _check(options: argparse.Namespace) -> None:
    if not options.config:
        raise UserError("expected `--config` with a stage file, got none.")
    for name in ("nodes", "grace", "cpus_per_task"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"expected `--{name.replace('_', '-')}` of at least 1, got {value}.")
    if options.gpus_per_node < 0:
        raise UserError(f"expected `--gpus-per-node` of at least 0, got {options.gpus_per_node}.")
    if options.time is not None and not TIME.fullmatch(options.time):
        raise UserError(
            f"expected `--time` as SLURM reads it, for example 04:00:00 or 1-12:00:00, got {options.time!r}."
        )
    if bool(options.seeds) != bool(options.out):
        raise UserError("expected `--seeds` and `--out` together: each seed has a run directory of its own there.")
    for name in ("partition", "account", "job_name"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"[\w.,+-]+", value):
            raise UserError(f"expected a name as `--{name.replace('_', '-')}`, got {value!r}.")
