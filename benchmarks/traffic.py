"""How many bytes do the kernels of an extended block move, forward and backward, against what none can avoid?

    python benchmarks/traffic.py

Runs without a GPU: the bytes follow from the shapes, and a test holds them to every load and store of the kernels as
Triton's interpreter runs them. *Moved* are the different bytes that each kernel reads and those that it writes: what
the memory of a GPU has to give where its cache answers whatever one kernel reads again. *Asked* are all loads and
stores, each tile's re-reads included, which the cache serves. What is unavoidable depends on what is granted:

- `each tensor once`: tokens in, sums out, all weights, the first projection that backward needs, and the gradients of
  these, once in each pass; nothing else.
- `two products`: also what one product hands to the next (the activation; its gradient), written once and read once,
  since a second product needs whole rows of the first, which do not fit a processor's own memory.
- `fixed order`: also the rows of a token's experts, written once and read once. They could be added up where they arise
  by atomic additions only, whose order differs from run to run, so that no run would repeat bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from gpu import LENGTH, NEW_EXPERTS, SEQUENCES, SHAPES
from harness import Row, table

from moextend_pl.moe.kernels.launch import GRADIENT, PAIR, SINGLE
from moextend_pl.moe.kernels.order import ROWS

ITEM = 2
"""Bytes of a number in bf16."""
SLOT = 64
"""More bytes than the order of the slots and their routing weights take for each slot, in both passes together."""


@dataclass(frozen=True)
class Block:
    """An extended block and how its tokens choose.

    Attributes:
        tokens: T.
        width: D.
        inner: I.
        top_k: K.
        slots_M: Slots of each expert, new ones last.
        new: N.
    """

    tokens: int
    width: int
    inner: int
    top_k: int
    slots_M: tuple[int, ...]
    new: int

    @property
    def slots(self) -> int:
        """S."""
        return sum(self.slots_M)

    @property
    def tiles(self) -> int:
        """Tiles of rows that hold a slot."""
        return sum(ceil(slots / ROWS) for slots in self.slots_M)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one kernel."""

    read: int
    written: int
    asked: int


def _product(block: Block, rows: int, inner: int, width: int, written: int, columns: int) -> Traffic:
    """A grouped product of `rows` different rows of `inner` numbers with matrices of `width` columns."""
    weights = inner * width
    asked = block.tiles * (ceil(width / columns) * ROWS * inner + weights)
    return Traffic(ITEM * (rows * inner + len(block.slots_M) * weights), ITEM * written, ITEM * (asked + written))


def _weights(block: Block, rows: int, columns: int) -> Traffic:
    """The gradient (rows, columns) of each new expert, one side read by token, where no token stands there twice."""
    slots = sum(block.slots_M[-block.new :])
    tiles = slots * (rows * ceil(columns / GRADIENT["COLUMNS"]) + columns * ceil(rows / GRADIENT["ROWS"]))
    written = block.new * rows * columns
    return Traffic(ITEM * slots * (rows + columns), ITEM * written, ITEM * (tiles + written))


def kernels(block: Block) -> dict[str, Traffic]:
    """Returns what each kernel of a training step moves of 16-bit tensors, in the order in which they run."""
    T, D, I, S, once = block.tokens, block.width, block.inner, block.slots, ITEM  # noqa: E741
    added = Traffic(once * S * D, once * T * D, once * (S + T) * D)
    weighted = Traffic(added.read + once * S, added.written, added.asked + once * S)
    new = sum(block.slots_M[-block.new :])
    pair = _product(block, T, D, 2 * I, 3 * S * I, 2 * PAIR["COLUMNS"])  # one tile of rows serves gate and up
    gradient = Traffic(once * S * (3 * I + 1), once * (S * (2 * I + 1) + new * I), once * (S * (5 * I + 2) + new * I))
    return {
        "gate_up": pair,
        "product": _product(block, S, I, D, S * D, SINGLE["COLUMNS"]),
        "sum_slots": weighted,
        "product of dy": _product(block, T, D, I, S * I, SINGLE["COLUMNS"]),
        "activation_gradient": gradient,
        "product of dx": _product(block, S, 2 * I, D, S * D, SINGLE["COLUMNS"]),
        "sum_slots of dx": added,
        "weight_gradient of gate_up": _weights(block, 2 * I, D),
        "weight_gradient of down": _weights(block, D, I),
    }


def unavoidable(block: Block) -> dict[str, int]:
    """Returns the bytes that are unavoidable by each definition."""
    T, D, I, S = block.tokens, block.width, block.inner, block.slots  # noqa: E741
    new_slots = sum(block.slots_M[-block.new :])
    weights, kept = len(block.slots_M) * 3 * D * I, S * 2 * I
    forward = T * D + weights + kept + T * D
    backward = T * D + weights + kept + T * D + new_slots * D + block.new * 3 * D * I
    once = ITEM * (forward + backward)
    products = once + ITEM * 2 * (S * I + S * 2 * I)
    return {"each tensor once": once, "two products": products, "fixed order": products + ITEM * 2 * 2 * S * D}


def moved(block: Block) -> int:
    """Returns all bytes moved, the order of the slots included."""
    return sum(one.read + one.written for one in kernels(block).values()) + SLOT * block.slots


def real_block(shape: str) -> Block:
    """Returns the extended block of a published model for the batch of `gpu.py`, its tokens spread evenly."""
    config = SHAPES[shape]
    tokens, top_k = SEQUENCES * LENGTH, config["num_experts_per_tok"]
    experts = config.get("num_experts") or config["num_local_experts"]
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    each, more = divmod(tokens * top_k, experts + NEW_EXPERTS)
    slots_M = tuple(each + (n < more) for n in range(experts + NEW_EXPERTS))
    return Block(tokens, config["hidden_size"], inner, top_k, slots_M, NEW_EXPERTS)


def row(shape: str) -> Row:
    """Returns a line of the table."""
    block = real_block(shape)
    total = moved(block)
    asked = sum(one.asked for one in kernels(block).values())
    ratios = {f"against `{name}`": f"{total / least:.2f}x" for name, least in unavoidable(block).items()}
    return {"shape": shape, "moved GB": f"{total / 1e9:.2f}", "asked GB": f"{asked / 1e9:.1f}", **ratios}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    print(table([row(shape) for shape in SHAPES]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
