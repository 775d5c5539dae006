"""What does the extend stage of a large model hold, send and reach on 1 to 512 GPUs? On paper, from `plan`.

    python benchmarks/scale.py [--write]

`--write` puts the table into docs/scale.md, which says what is assumed. Memory, bytes and operations are those of
`moextend_pl.plan`; the speed of a card and of the network are assumptions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pages import DOCS, grid, put

from moextend_pl.plan.advice import fits
from moextend_pl.plan.cost import RunShape
from moextend_pl.plan.facts import GPUS, ModelShape
from moextend_pl.plan.operations import operations
from moextend_pl.plan.run_shape import Wishes, run_shape
from moextend_pl.plan.shapes import read_shape
from moextend_pl.plan.sharing import memory, received_bytes, reduced_bytes
from moextend_pl.plan.stage_model import read_stage

CONFIGS = Path(__file__).parents[1] / "configs"
CARD, NODE, COUNTS = GPUS["h200"], 8, (1, 8, 64, 512)
SEQUENCES, MICRO_BATCH = 128, 2
IN_NODE, BETWEEN_NODES = 300e9, 40e9
"""Bytes a second that a GPU receives: two thirds of NVLink 4, and four fifths of a network of 400 Gbit/s for each."""

# Recipe -> its name, and the share of the card's peak: docs/speed.md, not compiled, of 778 TFLOP/s of 989.
MODELS = {"mixtral_8x7b": ("Mixtral-8x7B", 0.52 * 778 / 989), "qwen3_30b_a3b": ("Qwen3-30B-A3B", 0.27 * 778 / 989)}
COLUMNS = ["model", "GPUs", "strategy", "GB on each", "fits", "GB received a step", "of it between nodes"]
COLUMNS += ["tokens/s, sending hidden", "tokens/s, nothing hidden"]


@dataclass(frozen=True)
class Row:
    """One way to run a stage.

    Attributes:
        gpus: Their number.
        strategy: As in `trainer.strategy`.
        memory: Bytes on each GPU.
        fits: Whether that is within the usable memory of the card.
        received: Bytes that each receives in a step.
        between: Those of them that pass between nodes.
        hidden: Tokens a second of all GPUs if computing hides all sending.
        open: The same if it hides none.
    """

    gpus: int
    strategy: str
    memory: float
    fits: bool
    received: float
    between: float
    hidden: float
    open: float


def runs(one: RunShape, gpus: int) -> Iterator[tuple[str, RunShape]]:
    """Yields strategies with what they do in a step: of 128 sequences, or of two a GPU if that is more."""
    accumulate = max(SEQUENCES // (MICRO_BATCH * gpus), 1)
    run = replace(one, gpus=gpus, micro_batch=MICRO_BATCH, accumulate=accumulate)
    yield "ddp" if gpus > 1 else "one process", run
    if gpus > 1:
        yield "fsdp2", replace(run, shared_by=gpus)
        if gpus > NODE:
            yield "hsdp", replace(run, shared_by=NODE)
        yield "expert_parallel", replace(run, shared_by=NODE, shares_experts=True)


def row(shape: ModelShape, run: RunShape, strategy: str, mfu: float) -> Row:
    """Does the arithmetic of one row."""
    shared = received_bytes(shape, run) if run.shared_by > 1 else 0.0
    summed = reduced_bytes(shape, run) if run.gpus > 1 else 0.0
    between = (summed + (shared if run.shared_by > NODE else 0.0)) if run.gpus > NODE else 0.0
    seconds = run.accumulate * operations(shape, run).total / (mfu * CARD.flops)
    sending = between / BETWEEN_NODES + (shared + summed - between) / IN_NODE
    tokens = run.gpus * run.accumulate * run.micro_batch * run.mean_length
    return Row(
        gpus=run.gpus,
        strategy=strategy,
        memory=memory(shape, run).total,
        fits=fits(shape, run, CARD),
        received=shared + summed,
        between=between,
        hidden=tokens / seconds,
        open=tokens / (seconds + sending),
    )


def rows(recipe: str) -> list[Row]:
    """Returns the rows of the extend stage of a recipe."""
    stage = read_stage(["--config", str(CONFIGS / recipe / "3_extend.yaml")])
    shape = read_shape(stage.module, stage.compute_dtype.itemsize, stage.mixed)
    one = run_shape(
        stage.config,
        Wishes(gpus=1),
        shape,
        compute_bytes=stage.compute_dtype.itemsize,
        recompute=stage.compute.activation_checkpointing,
        recompute_images=getattr(stage.module, "activation_checkpointing", False),
    )
    mfu = MODELS[recipe][1]
    return [row(shape, run, strategy, mfu) for gpus in COUNTS for strategy, run in runs(one, gpus)]


def table() -> str:
    """Returns the table of docs/scale.md."""
    lines = []
    for recipe, (name, _) in MODELS.items():
        for each in rows(recipe):
            cells = [name, f"{each.gpus}", f"`{each.strategy}`", f"{each.memory / 1e9:,.0f}"]
            cells += ["yes" if each.fits else "no", f"{each.received / 1e9:,.1f}", f"{each.between / 1e9:,.1f}"]
            lines.append([*cells, f"{each.hidden:,.0f}", f"{each.open:,.0f}"])
    return grid(COLUMNS, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or writes it into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    options = parser.parse_args(argv)
    text = table()
    if options.write:
        put(DOCS / "scale.md", "scale.py", text)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
