"""Memory and speed of common GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from moextend_pl.contracts import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: As on the command line.
        memory: Bytes that a program can use.
        flops: Dense 16-bit matrix operations a second, as its maker states them, without sparsity.
    """

    name: str
    memory: float
    flops: float


# Memory as drivers report it to a program, in whole GiB rounded down; speed in 10^12 a second from the data sheets.
_TABLE = {
    "b200": (178, 2250),
    "h200": (139, 989),
    "h100": (79, 989),
    "h800": (79, 989),
    "a100-80g": (79, 312),
    "a800-80g": (79, 312),
    "a100-40g": (39, 312),
    "l40s": (44, 362),
    "rtx5090": (31, 209),
    "rtx4090": (23, 165),
    "rtx3090": (23, 71),
}
GPUS = {name: Gpu(name, memory * GIB, speed * 1e12) for name, (memory, speed) in _TABLE.items()}


def choose_gpu(name: str | None, tflops: float | None = None, memory: float | None = None) -> Gpu | None:
    """Returns a card by name, or one described by hand, or None if nothing was said.

    Args:
        name: One of `GPUS`.
        tflops: Speed to assume instead, in 10^12 operations a second.
        memory: Memory to assume instead, in 10^9 bytes.

    Raises:
        UserError: If the name is not known and the description is not complete.
    """
    if name is None and tflops is None and memory is None:
        return None
    name = (name or "GPU").lower()
    known = GPUS.get(name)
    if known is None and (tflops is None or memory is None):
        raise UserError(
            f"Expected `--gpu` among {', '.join(GPUS)}, got '{name}'. For another card give `--gpu-tflops` and "
            "`--gpu-memory`."
        )
    return Gpu(
        name=name,
        memory=memory * 1e9 if memory is not None else known.memory if known else 0.0,
        flops=tflops * 1e12 if tflops is not None else known.flops if known else 0.0,
    )
