"""The commands of `python -m moextend_pl`.

This file imports neither torch nor Lightning, so that the overview and a mistyped command answer at
once; every command imports what it needs when it is called.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from moextend_pl.cli.neighbours import check_neighbours
from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_fault
from moextend_pl.runs.interruptions import deafen, listening

if TYPE_CHECKING:
    from moextend_pl.cli.stage import MoExtendCLI

STAGE_COMMANDS = {
    "fit": "train one stage; continues an interrupted run by itself",
    "validate": "measure a stage on its validation split",
    "test": "measure a stage on its test split",
    "predict": "write the answers of a stage to a file",
}
TOOL_COMMANDS = {
    "plan": ("moextend_pl.plan.command", "memory, hours and cost of a stage, without its weights"),
    "quickstart": ("moextend_pl.quickstart.command", "run the whole method on easy-VQA and write a report"),
    "real": ("moextend_pl.quickstart.real", "let SmolLM2-135M learn to see, and measure what it still knows"),
    "extend": (
        "moextend_pl.extend.command",
        "from your own data to an extended model: write three stages and run them",
    ),
    "configs": ("moextend_pl.cli.recipes", "list the stage files that come with the package, or copy some"),
    "slurm": ("moextend_pl.cli.slurm", "print the batch script of a stage, filled in"),
    "generate": ("moextend_pl.cli.generate", "ask a trained model about pictures"),
    "chat": ("moextend_pl.cli.chat", "talk with a trained model about pictures"),
    "export": ("moextend_pl.export.command", "write a run as a folder that transformers loads, or as one to share"),
    "merge": ("moextend_pl.export.merge", "join a shared delta to its base"),
    "assemble": ("moextend_pl.export.assemble", "join dense models of one base to a mixture, an expert each"),
    "demo": ("moextend_pl.export.demo.command", "show a web page to talk with a trained model"),
    "serve": ("moextend_pl.export.serving.command", "answer over HTTP, as OpenAI's interface asks"),
    "evaluate": ("moextend_pl.evaluation.command", "ask a trained model published test sets and score it"),
    "rescore": ("moextend_pl.evaluation.rescore", "score kept answers again, without a model"),
    "report": ("moextend_pl.reports.command", "show what a run has measured as one page"),
    "convert": ("moextend_pl.convert.command", "read and write published checkpoints of CuMo and MoExtend"),
    "shards": ("datamodules.command", "build, index, check and show shards of samples"),
}
OWN_LOGGERS = ("moextend_pl", "datamodules", "callbacks")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
OVERVIEW = """\
usage: python -m moextend_pl COMMAND [OPTIONS]

Extends a mixture-of-experts language model to see, without changing what it knows.

{commands}

  python -m moextend_pl quickstart
  python -m moextend_pl fit --config configs/easy_vqa/1_align.yaml --trainer.max_steps 10
  python -m moextend_pl plan --config configs/mixtral_8x7b/3_extend.yaml --gpu h200 --price 3
  python -m moextend_pl COMMAND --help

A mistake in a config or an option ends in one line and exit code 2. MOEXTEND_TRACEBACK=1 shows
where it was noticed.
"""


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is at that moment, which notebooks and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def overview() -> str:
    """Returns the list of commands, one line each."""
    lines = {**STAGE_COMMANDS, **{name: text for name, (_, text) in TOOL_COMMANDS.items()}}
    return OVERVIEW.format(commands="\n".join(f"  {name:<12}{text}" for name, text in lines.items()))


def shell(argv: list[str]) -> int:
    """Runs the one command of a process, whose end no signal disturbs."""
    try:
        return main(argv)
    finally:
        deafen()


def main(argv: list[str]) -> int:
    """Runs one command as a shell's.

    Returns:
        The exit code: 0, 2 for a mistake of the user, 130 when interrupted. Bugs keep their traceback.
    """
    try:
        result = run(argv)
    except UserError as error:
        if os.environ.get("MOEXTEND_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {_one_line(str(error))}\n")
        return EXIT_USER_ERROR
    except OSError as error:
        fault = write_fault(error)
        if fault is None or os.environ.get("MOEXTEND_TRACEBACK"):
            raise
        sys.stderr.write(
            f"error: cannot use {fault.filename or 'a file'}: {fault.strerror}. Make room, or give a place that can be "
            "read and written; what was written before is whole.\n"
        )
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        goes_on = argv[:1] in (["fit"], ["quickstart"], ["real"], ["predict"]) or argv[:3] in (
            ["shards", "build", "llava"],
            ["shards", "build", "data"],
        )
        sys.stderr.write(f"interrupted{'; the same command continues where it stopped' if goes_on else ''}\n")
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def run(argv: list[str]) -> MoExtendCLI | int:
    """Runs one command inside this process; may be called any number of times.

    A strategy that launches its own processes (DDP outside SLURM) starts them from `sys.argv`, so it
    belongs on the shell's command line.

    Returns:
        The finished CLI with its `model`, `datamodule` and `trainer`, or the exit code of a command that has none.

    Raises:
        UserError: For every mistake that the user can mend.
    """
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    configure_logging()
    if command in (*STAGE_COMMANDS, "quickstart", "real", "shards", "plan"):
        check_neighbours()
    if command in STAGE_COMMANDS:
        with listening() as notes:
            from moextend_pl.cli.stage import run_stage

            return run_stage(argv, notes)
    if command not in TOOL_COMMANDS:
        raise UserError(_unknown_command(command))
    # by name, because the core never imports a data set's package
    return int(importlib.import_module(TOOL_COMMANDS[command][0]).main(argv[1:]) or 0)


def configure_logging() -> None:
    """Sends our own messages to stderr in a short format and drops a few lines that tell the user nothing."""
    for name in OWN_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    _silence_noise()


def _silence_noise() -> None:
    """Hides third-party advice that does not apply here; each entry says why."""
    # Samples are decoded from one streamed shard set: more workers than cores do not help on a laptop.
    warnings.filterwarnings("ignore", message=r".*does not have many workers which may be a bottleneck.*")
    # Finding last.ckpt in the run directory is how a run continues.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty.*")
    # Frozen towers are in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training.*")
    # The datamodule keeps its own place: a resumed run sees exactly the next global batch.
    warnings.filterwarnings("ignore", message=r"You're resuming from a checkpoint that ended before the epoch ended.*")
    # ThroughputMonitor counts samples and tokens here; operations of a sparse model are no fixed number.
    warnings.filterwarnings("ignore", message=r"When using the `ThroughputMonitor`, you need to define.*")
    # Short stages log fewer steps than Lightning's default interval.
    warnings.filterwarnings("ignore", message=r"The number of training batches .* smaller than the logging interval")
    # The model reads off a batch what a step must know, whoever made the batch; ours needs no such hook.
    warnings.filterwarnings("ignore", message=r"You have overridden `on_before_batch_transfer` in `LightningModule`")
    # Lightning calls torch's older name of a tree test; nothing here can change that.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).* is deprecated.*")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logger = logging.getLogger(f"lightning.pytorch.{name}")
        if _is_worth_reading not in logger.filters:
            logger.addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Drops Lightning's advertising, its note about TPUs, and one about saving that sounds like unsafe loading."""
    message = record.getMessage()
    return not ("Tip:" in message or message.startswith(("TPU available: False", "`weights_only` was not set")))


def _unknown_command(command: str) -> str:
    known = [*STAGE_COMMANDS, *TOOL_COMMANDS]
    close = difflib.get_close_matches(command, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(known)}."
    return f"there is no command '{command}'; {hint}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
