"""Counts the bytes that interpreted Triton kernels read and write, kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

Addresses = list[np.ndarray[Any, Any]]


@dataclass
class Launch:
    """One start of a kernel: addresses of 16-bit floats that it loads and stores, and of everything else by size."""

    kernel: str
    loaded: Addresses = field(default_factory=list)
    stored: Addresses = field(default_factory=list)
    others: dict[int, Addresses] = field(default_factory=dict)
    asked: int = 0

    def note(self, pointers: Any, mask: Any, into: Addresses) -> None:
        """Counts what a mask leaves of a load or store."""
        kind, live = pointers.get_element_ty(), pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if kind.is_bf16():
            into.append(np.unique(live))
            self.asked += 2 * live.size
        else:
            self.others.setdefault(kind.primitive_bitwidth // 8, []).append(np.unique(live))

    @property
    def read(self) -> int:
        """Different bytes of 16-bit floats that are loaded."""
        return 2 * different(self.loaded)

    @property
    def written(self) -> int:
        """The same of those that are stored."""
        return 2 * different(self.stored)

    @property
    def rest(self) -> int:
        """Different bytes of everything else."""
        return sum(size * different(addresses) for size, addresses in self.others.items())


def different(addresses: Addresses) -> int:
    """Returns how many addresses there are."""
    return len(np.unique(np.concatenate(addresses))) if addresses else 0


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """Yields the kernels that start inside, each with what it moved."""
    launches: list[Launch] = []
    start = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def starts(self: Any, *arguments: Any, **named: Any) -> Any:
        launches.append(Launch(self.fn.__name__))
        with _disable_current_modes():  # what the interpreter itself copies is none of the kernel's
            return start(self, *arguments, **named)

    def loads(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].note(pointers, mask.data, launches[-1].loaded)
        return load(self, pointers, mask, *rest)

    def stores(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].note(pointers, mask.data, launches[-1].stored)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(GridExecutor, "__call__", starts),
        patch.object(InterpreterBuilder, "create_masked_load", loads),
        patch.object(InterpreterBuilder, "create_masked_store", stores),
    ):
        yield launches
