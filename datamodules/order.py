"""In which order samples are seen: a pure function of (seed, epoch), the same for any ranks and workers.

Positions count samples over the endless row of epochs. A global batch takes the positions that follow those
of the batch before it (which of them, says a plan in `batching.py`); rank r of R takes the r-th of R equal
slices of its rows. What a run has seen is therefore one number: the samples consumed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from moextend_pl.contracts import UserError

FILLER = -1
"""Stands for "no sample" where a rank must go on although the set has ended."""


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatters 64-bit numbers (splitmix64, https://prng.di.unimi.it/splitmix64.c); no library can change it."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """Returns the numbers 0 .. count - 1 in an order that depends on the seeds alone, (count,) int64."""
    state = np.zeros(1, dtype=np.uint64)
    for seed in seeds:
        state = _mix(state ^ np.array([seed % 2**64], dtype=np.uint64))
    return np.argsort(_mix(_mix(np.arange(count, dtype=np.uint64) ^ state)), kind="stable")


class EndlessOrder(ABC):
    """Epoch after epoch of units; a subclass says what an epoch is.

    A unit is what becomes one `Sample`: a conversation, or one turn of it.

    Args:
        seed: Any number.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # Two epochs: a batch may lie across the border. Per object, so that it dies with it.
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _permutation(self, epoch: int) -> np.ndarray: ...

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the units of one epoch in their order, (n,) int64; treat it as read-only."""
        return self._epoch(epoch)

    def units(self, start: int, count: int) -> np.ndarray:
        """Returns the units at positions start .. start + count - 1, across epochs."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, len(self))
            part = self.epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class Order(EndlessOrder):
    """Order of all units of a set: shards are shuffled, then units inside blocks of shards.

    Blocks keep reads near to each other, and bound what a cache has to hold.

    Args:
        sizes: Units of each shard.
        seed: Any number.
        block: K, shards that are mixed with each other.
    """

    def __init__(self, sizes: Sequence[int], seed: int, block: int = 8) -> None:
        if block < 1:
            raise UserError(f"Expected at least 1 shard in a block, got {block}.")
        super().__init__(seed)
        self.sizes = [int(size) for size in sizes]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.block = block

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _permutation(self, epoch: int) -> np.ndarray:
        shards = shuffled(len(self.sizes), self.seed, epoch)
        blocks = []
        for number, first in enumerate(range(0, len(shards), self.block)):
            members = shards[first : first + self.block]
            units = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in members])
            blocks.append(units[shuffled(len(units), self.seed, epoch, number + 1)])
        return np.concatenate(blocks)


def slice_of_rank(batch_size: int, rank: int, world_size: int) -> slice:
    """Returns which part of a global batch a rank takes.

    Raises:
        UserError: If the ranks cannot share the batch evenly.
    """
    if batch_size < 1 or batch_size % world_size:
        lower = batch_size - batch_size % world_size
        valid = [number for number in (lower, lower + world_size) if number > 0]
        raise UserError(
            f"Expected a global batch size that {world_size} rank(s) can share evenly, got {batch_size}. "
            f"Use {' or '.join(map(str, valid))}."
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


class EveryUnitOnce(Sampler[list[int]]):
    """Batches for evaluation: each unit exactly once over all ranks, as many batches on each rank.

    A rank that gets no unit of the last batch gets one `FILLER`, so that no rank waits for it.

    Args:
        units: What to evaluate, in order.
        batch_size: Global batch size, over all ranks.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        UserError: If the ranks cannot share the batch evenly.
    """

    def __init__(self, units: Sequence[int] | np.ndarray, batch_size: int, rank: int, world_size: int) -> None:
        self.units = [int(unit) for unit in units]
        self.batch_size = batch_size
        self.part = slice_of_rank(batch_size, rank, world_size)

    def __len__(self) -> int:
        return math.ceil(len(self.units) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.units), self.batch_size):
            yield self.units[start : start + self.batch_size][self.part] or [FILLER]
