"""How does the cost of an extended step grow with experts, tokens, layers and added experts?

    python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --quick

Blocks are timed forward and backward, models with their optimizer. `ratio` is relative to the first row of a
section; `per_unit` is the ratio divided by how many times more of the quantity there is, 1 where cost is linear.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from block import Shape, extended_block, step_of
from harness import DTYPES, Row, finish, interleaved, parse
from step import Case, Size, Trained, make_batch
from torch.nn import functional as F

from moextend_pl.moe import dispatch


def block_step(shape: Shape, dtype: str, options: argparse.Namespace, added: int = 1) -> Callable[[], object]:
    """Returns one forward and backward pass of an extended block on random tokens."""
    block = extended_block(shape, DTYPES[dtype], dispatch.FROZEN_EXPERTS, added, options.device)
    generator = torch.Generator("cpu").manual_seed(1)
    x, dy = (
        torch.randn(1, shape.tokens, shape.width, generator=generator, device="cpu").to(options.device, DTYPES[dtype])
        for _ in range(2)
    )
    return step_of(block, x, dy)


def products_step(shape: Shape, dtype: str, options: argparse.Namespace) -> Callable[[], object]:
    """Returns the four grouped products of frozen experts, forward and towards their inputs, and nothing else."""
    generator, kind = torch.Generator("cpu").manual_seed(1), DTYPES[dtype]
    rows, inner = shape.tokens * shape.top_k, shape.inner
    chosen = torch.randint(0, shape.experts, (rows,), generator=generator, device="cpu")
    ends = chosen.bincount(minlength=shape.experts).cumsum(0).to(options.device, torch.int32)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device="cpu").to(options.device, kind)

    up, down = random(shape.experts, 2 * inner, shape.width), random(shape.experts, shape.width, inner)
    x, hidden, d_hidden = random(rows, shape.width), random(rows, inner), random(rows, 2 * inner)
    pairs = ((x, up.mT), (hidden, down.mT), (x, down), (d_hidden, up))
    return lambda: [F.grouped_mm(left, right, offs=ends) for left, right in pairs]


def model_step(layers: int, dtype: str, options: argparse.Namespace) -> Callable[[], object]:
    """Returns one step of a model that is extended in all layers, its projector learning."""
    size = Size(layers=layers, width=32, inner=32, vocabulary=64, batch=2, sequence=32)
    if not options.quick:
        size = Size(layers=layers)
    case = Case("extended", dispatch.FROZEN_EXPERTS, first_extended=0)
    model = Trained(case, size, DTYPES[dtype], options.device)
    batch, features = make_batch(size, DTYPES[dtype], options.device)
    return lambda: model.step(batch, features)


def section(
    steps: Mapping[float, Callable[[], object]], dtype: str, unit: str, options: argparse.Namespace
) -> list[Row]:
    """Times steps in turns and relates each to the first."""
    times = interleaved({str(amount): step for amount, step in steps.items()}, options)
    first = next(iter(steps))
    rows = []
    for amount in steps:
        ratio = times[str(amount)]["median_ms"] / times[str(first)]["median_ms"]
        per_unit = round(ratio * first / amount, 3) if first else None
        rows.append(
            {"dtype": dtype, unit: amount, **times[str(amount)], "ratio": round(ratio, 3), "per_unit": per_unit}
        )
    return rows


def measure(dtype: str, options: argparse.Namespace) -> dict[str, list[Row]]:
    """Runs all sections for one dtype."""
    width, inner, tokens = (32, 64, 64) if options.quick else (512, 1024, 2048)
    # Equal work: T * K * I is the same in every row of a section.
    same = {e: Shape(e, 2, inner, width, tokens) for e in (8, 16, 32, 64)}
    finer = {e: Shape(e, k, inner * 2 // k, width, tokens) for e, k in ((8, 2), (16, 2), (32, 4), (64, 8))}
    longer = {t: Shape(8, 2, inner, width, t) for t in (tokens // 4, tokens // 2, tokens, tokens * 2)}
    ends = (8, 64)
    added = {n: Shape(8, 2, inner, width, tokens) for n in (0, 1, 2, 4)}
    return {
        f"experts, {dtype}: same top-k and width": section(
            {e: block_step(shape, dtype, options) for e, shape in same.items()}, dtype, "experts", options
        ),
        f"experts, {dtype}: finer ones, as many more selected": section(
            {e: block_step(shape, dtype, options) for e, shape in finer.items()}, dtype, "experts", options
        ),
        f"grouped products alone, {dtype}: same top-k and width": section(
            {e: products_step(same[e], dtype, options) for e in ends}, dtype, "experts", options
        ),
        f"grouped products alone, {dtype}: finer ones": section(
            {e: products_step(finer[e], dtype, options) for e in ends}, dtype, "experts", options
        ),
        f"tokens, {dtype}": section(
            {t: block_step(shape, dtype, options) for t, shape in longer.items()}, dtype, "tokens", options
        ),
        f"layers, {dtype}": section({n: model_step(n, dtype, options) for n in (2, 4, 8)}, dtype, "layers", options),
        f"added experts, {dtype}: 0 is the frozen base": section(
            {n: block_step(shape, dtype, options, n) for n, shape in added.items()}, dtype, "added", options
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table for each quantity and returns the exit code."""
    options = parse(__doc__.splitlines()[0], argv)
    sections = {title: rows for dtype in options.dtype for title, rows in measure(dtype, options).items()}
    return finish(__doc__.splitlines()[0], sections, options)


if __name__ == "__main__":
    sys.exit(main())
