"""Whether a stage fits a card, and what would help where it does not."""

from __future__ import annotations

import math
from dataclasses import replace

from moextend_pl.plan.cost import RunShape, memory
from moextend_pl.plan.facts import ModelShape
from moextend_pl.plan.gpus import Gpu

USABLE = 0.95  # the rest is for the driver's context, workspaces of kernels and gaps between blocks
LENGTH_STEP = 128


def fits(shape: ModelShape, run: RunShape, gpu: Gpu) -> bool:
    """Tells whether a stage fits into the usable part of a card's memory."""
    return memory(shape, run).total <= USABLE * gpu.memory


def remedies(shape: ModelShape, run: RunShape, gpu: Gpu) -> list[str]:
    """Lists what would make a stage fit, the smallest change first, with the memory it would then take.

    Args:
        shape: The model.
        run: A run that does not fit.
        gpu: The card.
    """
    found = []
    if run.micro_batch > 1:
        smaller = _largest([replace(run, micro_batch=n) for n in range(1, run.micro_batch)], shape, gpu)
        if smaller is not None:
            found.append(f"{smaller.micro_batch} sequences at a time ({_gb(memory(shape, smaller).total)})")
    one = replace(run, micro_batch=1)
    image = math.ceil(run.images * shape.tokens_per_image)
    lengths = range(LENGTH_STEP * (image // LENGTH_STEP + 1), run.length, LENGTH_STEP)
    shorter = _largest([replace(one, length=length, learned=None) for length in lengths], shape, gpu)
    if shorter is not None and not found:
        found.append(f"one sequence of {shorter.length} tokens at a time ({_gb(memory(shape, shorter).total)})")
    packed = replace(run, nf4=True)
    if not run.nf4 and any(part.quantisable for part in shape.parts):
        for choice in (packed, replace(packed, micro_batch=1)):
            if fits(shape, choice, gpu):
                batch = "" if choice.micro_batch == run.micro_batch else " and one sequence at a time"
                found.append(f"`quantize: nf4`{batch} ({_gb(memory(shape, choice).total)})")
                break
    found += _sharded(shape, run, gpu)
    return found


def _largest(runs: list[RunShape], shape: ModelShape, gpu: Gpu) -> RunShape | None:
    return next((run for run in reversed(runs) if fits(shape, run, gpu)), None)


def _sharded(shape: ModelShape, run: RunShape, gpu: Gpu) -> list[str]:
    for choice in dict.fromkeys((run, replace(run, micro_batch=1))):
        need = memory(shape, choice)
        room = USABLE * gpu.memory - (need.total - need.kept)
        if room > 0:
            ranks = max(2, math.ceil(need.kept / room))
            share = need.total - need.kept + need.kept / ranks
            batch = "" if choice.micro_batch == run.micro_batch else ", one sequence at a time"
            return [f"weights sharded over {ranks} GPUs (FSDP{batch}; {_gb(share)} on each; DDP only replicates)"]
    return []


def verdict(shape: ModelShape, run: RunShape, gpu: Gpu) -> str:
    """Returns one line: whether the stage fits, and if not what would help.

    Args:
        shape: The model.
        run: The run.
        gpu: The card.
    """
    need, room = memory(shape, run), f"{_gb(USABLE * gpu.memory)} of {_gb(gpu.memory)} usable on {gpu.name}"
    if fits(shape, run, gpu):
        return f"fits: {_gb(need.total)} needed, {room}"
    if need.weights > USABLE * gpu.memory:
        text = f"does not fit: the weights alone take {_gb(need.weights)}, {room}"
    else:
        text = f"does not fit: {_gb(need.total)} needed, {room}"
    options = remedies(shape, run, gpu)
    return f"{text}; would help: {', or '.join(options)}" if options else f"{text}; take a larger card"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
