"""Which units form which global batch: one a row, sorted by length, or several a row.

A plan is a pure function from the position at which a batch starts to its rows and the position after it, so
that the samples consumed stay the whole state, whatever the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from datamodules.options import EvaluationSpec, ReadingSpec, RowSpec
from datamodules.order import FILLER, EndlessOrder, shuffled, slice_of_rank
from moextend_pl.contracts import UserError

Row = int | tuple[int, ...]
"""What becomes a row of a batch: a unit, or in packed batches several."""


def check_options(rows: RowSpec, reading: ReadingSpec, evaluation: EvaluationSpec) -> None:
    """Refuses options of batches that cannot be used, or not together.

    Raises:
        UserError: If packing has no length of a row, there are no or unused buckets, or a number is out of its range.
    """
    for name, value, least in (
        ("rows.max_length", rows.max_length, 1),
        ("reading.num_workers", reading.num_workers, 0),
        ("reading.keep_mib", reading.keep_mib, 0),
        ("evaluation.samples", evaluation.samples, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"Expected `{name}` of the data module of at least {least}, got {value}. Raise it.")
    if rows.packing and rows.max_length is None:
        raise UserError("Expected `max_length`, the tokens of a packed row, got none. Set it, or `packing: false`.")
    if rows.bucket < 1 or (rows.packing and rows.bucket > 1):
        raise UserError(
            f"Expected `bucket` of at least 1, and of 1 where samples are packed, got {rows.bucket} with "
            f"`packing: {str(rows.packing).lower()}`."
        )


class BatchPlan(Protocol):
    """Says which units form which global batch.

    Attributes:
        batch_size: Rows of a global batch.
    """

    batch_size: int

    def batch(self, start: int) -> tuple[list[Row], int]:
        """Returns the rows of the global batch that starts at a position, and the position after it."""

    def after(self, start: int, batches: int) -> int:
        """Returns the position after some batches."""


class PlainBatches:
    """A unit a row, in the order of the set.

    Args:
        order: The order of the set.
        batch_size: Rows of a global batch.
    """

    def __init__(self, order: EndlessOrder, batch_size: int) -> None:
        self.order = order
        self.batch_size = batch_size

    def batch(self, start: int) -> tuple[list[Row], int]:
        """Returns rows and the position after them."""
        return self.order.units(start, self.batch_size).tolist(), start + self.batch_size

    def after(self, start: int, batches: int) -> int:
        """Returns the position after some batches."""
        return start + batches * self.batch_size


class BucketBatches(PlainBatches):
    """A unit a row; batches of one window are formed by length, so that little is padded.

    The units of a window, which are the same as without buckets, are sorted by length and cut into batches;
    the batches of the window are shuffled. A start is always a multiple of the batch size.

    Args:
        order: The order of the set.
        lengths: Length of each unit, in tokens.
        batch_size: Rows of a global batch.
        window: Batches of a window.
    """

    def __init__(self, order: EndlessOrder, lengths: np.ndarray, batch_size: int, window: int) -> None:
        super().__init__(order, batch_size)
        self.lengths = lengths
        self.window = window

    def batch(self, start: int) -> tuple[list[Row], int]:
        """Returns rows and the position after them."""
        number, place = divmod(start // self.batch_size, self.window)
        size = self.window * self.batch_size
        units = self.order.units(number * size, size)
        batches = units[np.argsort(self.lengths[units], kind="stable")].reshape(self.window, self.batch_size)
        chosen = shuffled(self.window, self.order.seed, number)[place]
        return batches[chosen].tolist(), start + self.batch_size


class PackedBatches:
    """Several units a row: each batch takes as many of the next units as fit into its rows.

    Inside a batch the units are packed longest first, each into the first row that has room for it; rows
    are then shuffled, so that no rank gets all the long units.

    Args:
        order: The order of the set.
        lengths: Length of each unit, in tokens; none is longer than a row.
        batch_size: Rows of a global batch.
        tokens: Tokens of a row.
    """

    def __init__(self, order: EndlessOrder, lengths: np.ndarray, batch_size: int, tokens: int) -> None:
        assert lengths.min() > 0
        assert lengths.max() <= tokens
        self.order = order
        self.lengths = lengths
        self.batch_size = batch_size
        self.tokens = tokens
        self._mean = float(lengths.mean())
        self._ends: dict[int, int] = {}

    def batch(self, start: int) -> tuple[list[Row], int]:
        """Returns rows and the position after them."""
        units = self._candidates(start)
        total = self.lengths[units].cumsum()
        # Units of half the tokens always fit: a unit finds no room only if every row is more than half full.
        fewest = max(1, int(np.searchsorted(total, self.batch_size * self.tokens / 2, side="right")))
        low, high = fewest, len(units)
        while low < high:
            middle = (low + high + 1) // 2
            fits = first_fit(self.lengths[units[:middle]], self.batch_size, self.tokens) is not None
            low, high = (middle, high) if fits else (low, middle - 1)
        rows_U = first_fit(self.lengths[units[:low]], self.batch_size, self.tokens)
        assert rows_U is not None
        self._ends[start] = start + low
        rows = [tuple(units[:low][rows_U == row].tolist()) or (FILLER,) for row in range(self.batch_size)]
        return [rows[row] for row in shuffled(self.batch_size, self.order.seed, start)], start + low

    def after(self, start: int, batches: int) -> int:
        """Returns the position after some batches."""
        for _ in range(batches):
            start = self._ends[start] if start in self._ends else self.batch(start)[1]
        return start

    def _candidates(self, start: int) -> np.ndarray:
        """Returns the next units, as many as would fit if no row had a gap."""
        budget = self.batch_size * self.tokens
        count = int(budget / self._mean) + 1
        while True:
            units = self.order.units(start, count)
            total = self.lengths[units].cumsum()
            if total[-1] > budget:
                return units[: max(1, int(np.searchsorted(total, budget, side="right")))]
            count *= 2


def first_fit(lengths: np.ndarray, rows: int, tokens: int) -> np.ndarray | None:
    """Packs items into rows, longest first, each into the first row with room (first-fit decreasing).

    Args:
        lengths: (U,) tokens of each item.
        rows: How many rows there are.
        tokens: Room of a row.

    Returns:
        (U,) row of each item, or None if they do not fit.
    """
    free = np.full(rows, tokens, dtype=np.int64)
    rows_U = np.empty(len(lengths), dtype=np.int64)
    for item in np.argsort(-lengths.astype(np.int64), kind="stable"):
        row = int(np.argmax(free >= lengths[item]))
        if free[row] < lengths[item]:
            return None
        free[row] -= lengths[item]
        rows_U[item] = row
    return rows_U


class EndlessBatches(Sampler[list[Any]]):
    """A rank's share of each batch of a plan, for training, without end; has no length on purpose.

    Args:
        plan: Says which units form which global batch.
        rank: Number of this process.
        world_size: Number of processes.
        consumed: Tells how many samples were consumed, over all ranks; asked when iteration starts.

    Raises:
        UserError: If the ranks cannot share the batch evenly.
    """

    def __init__(self, plan: BatchPlan, rank: int, world_size: int, consumed: Callable[[], int] = lambda: 0) -> None:
        self.plan = plan
        self.part = slice_of_rank(plan.batch_size, rank, world_size)
        self.consumed = consumed

    def __iter__(self) -> Iterator[list[Row]]:
        return self._batches(self.consumed())

    def _batches(self, start: int) -> Iterator[list[Row]]:
        while True:
            rows, start = self.plan.batch(start)
            yield rows[self.part]
