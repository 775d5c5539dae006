"""Whether a stage fits a card, and what would help where it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moextend_pl.plan import cost
from moextend_pl.plan.cost import RunShape
from moextend_pl.plan.facts import Gpu, ModelShape
from moextend_pl.plan.sharing import memory, shared

USABLE = 0.95  # the rest is for the driver's context, workspaces of kernels and gaps between blocks
LENGTH_STEP = 128
MOST_RANKS = 512


@dataclass(frozen=True)
class Remedy:
    """A change after which a stage fits.

    Attributes:
        text: What to change.
        bytes: Memory that each GPU then needs.
        run: The run after the change.
    """

    text: str
    bytes: float
    run: RunShape


def fits(shape: ModelShape, run: RunShape, gpu: Gpu) -> bool:
    """Tells whether a stage fits into the usable part of a card's memory."""
    return memory(shape, run).total <= USABLE * gpu.memory


def remedies(shape: ModelShape, run: RunShape, gpu: Gpu) -> list[Remedy]:
    """Lists what would make a stage fit, each on its own, with the same global batch."""
    batches = [run, *_smaller_batches(run)]
    options = [_first(shape, gpu, batches[1:]) or _first(shape, gpu, _shorter(shape, batches[-1]))]
    if not run.nf4 and any(part.quantisable for part in shape.parts):
        options.append(_first(shape, gpu, [replace(batch, nf4=True) for batch in batches], "`quantize: nf4`"))
    if not run.recompute and shape.layers:
        again = [replace(batch, recompute=True, recompute_images=True) for batch in batches]
        options.append(_first(shape, gpu, again, "`activation_checkpointing: true`"))
    if not run.nf4 and not run.compiled:  # neither is sharded
        options.append(_sharded(shape, batches, gpu))
    return [option for option in options if option is not None]


def _smaller_batches(run: RunShape) -> list[RunShape]:
    """Returns runs with fewer sequences at a time that still make up the batch of a step, the largest first."""
    step = run.micro_batch * run.accumulate
    sizes = [n for n in range(run.micro_batch - 1, 0, -1) if step % n == 0]
    return [replace(run, micro_batch=n, accumulate=step // n) for n in sizes]


def _shorter(shape: ModelShape, run: RunShape) -> list[RunShape]:
    shortest = LENGTH_STEP * (math.ceil(shape.placeholders(run.images)) // LENGTH_STEP + 1)
    lengths = reversed(range(shortest, run.length, LENGTH_STEP))
    return [replace(run, length=n, mean_length=min(run.mean_length, n), learned=None) for n in lengths]


def _first(shape: ModelShape, gpu: Gpu, runs: list[RunShape], change: str = "") -> Remedy | None:
    """Returns the first of some runs that fits."""
    for run in runs:
        if fits(shape, run, gpu):
            words = [change] if change else []
            words += [_batch(run)] if run is not runs[0] or not change else []
            return Remedy(" with ".join(words), memory(shape, run).total, run)
    return None


def _batch(run: RunShape) -> str:
    sequences = "1 sequence" if run.micro_batch == 1 else f"{run.micro_batch} sequences"
    return f"{sequences} of {run.length:,} tokens at a time"


def _sharded(shape: ModelShape, batches: list[RunShape], gpu: Gpu) -> Remedy | None:
    """Returns how many GPUs could share weights, gradients and optimizer: those that are there, or 2, 4, ... times."""
    alone = [(batch, cost.memory(shape, batch)) for batch in batches]
    ranks = max(batches[0].gpus, 2) if batches[0].shared_by == 1 else 2 * batches[0].gpus
    while ranks <= MOST_RANKS:
        for batch, need in alone:
            run = replace(batch, gpus=max(batch.gpus, ranks), shared_by=ranks, shares_experts=False)
            size = shared(need, shape, run).total
            if size <= USABLE * gpu.memory:
                return Remedy(f"`trainer.strategy: fsdp2` on {ranks} GPUs with {_batch(run)}", size, run)
        ranks *= 2
    return None


def verdict(shape: ModelShape, run: RunShape, gpu: Gpu) -> str:
    """Returns one line: whether the stage fits, and if not what would help."""
    need, room = memory(shape, run), f"{_gb(USABLE * gpu.memory)} of {_gb(gpu.memory)} usable on {gpu.name}"
    if fits(shape, run, gpu):
        return f"fits: {_gb(need.total)} needed, {room}"
    alone = need.weights > USABLE * gpu.memory
    text = f"the weights alone take {_gb(need.weights)}" if alone else f"{_gb(need.total)} needed"
    options = [f"{remedy.text} ({_gb(remedy.bytes)})" for remedy in remedies(shape, run, gpu)]
    return f"does not fit: {text}, {room}; " + (
        f"would help: {', or '.join(options)}" if options else "take a larger card"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
