"""Several shard sets as one: in a row, or mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.order import EndlessOrder, Order, shuffled
from moextend_pl.contracts import UserError


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards and its part in a mixture.

    Attributes:
        path: The folder.
        weight: Share of the samples that come from it, relative to the other sets; give it to all sets or to
            none. Without weights every sample is seen once an epoch.
        task: Name of the task that its samples belong to; a model may route by it.
    """

    path: str
    weight: float | None = None
    task: str = ""


Sets = str | ShardSet | Sequence[str | ShardSet] | None


def shard_sets(sets: Sets) -> tuple[ShardSet, ...]:
    """Returns what a user named as shard sets, in order.

    Raises:
        UserError: If only some sets have a weight, or a weight is not positive.
    """
    named = [sets] if isinstance(sets, str | ShardSet) else sets or []
    found = tuple(ShardSet(one) if isinstance(one, str) else one for one in named)
    weights = [one.weight for one in found]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise UserError(f"Expected a `weight` for every shard set or for none, got {weights}.")
    if not all(0 < weight < float("inf") for weight in given):
        raise UserError(f"Expected a `weight` above 0 for every shard set, got {weights}. Leave out unused sets.")
    return found


def training_order(sets: Sequence[ShardSet], sizes: Sequence[Sequence[int]], seed: int) -> EndlessOrder:
    """Returns the order of one or several shard sets; `sizes` are the units of each shard of each set."""
    weights = [one.weight for one in sets if one.weight is not None]
    if len(sets) < 2 or not weights:
        return Order([size for own in sizes for size in own], seed)
    return Mixture(sizes, weights, seed)


class Mixture(EndlessOrder):
    """Sets mixed by weight; an epoch is as long as all sets together.

    Each epoch takes from each set its share, rounded by largest remainder: the next units of that set's own
    endless order. A set that is too small for its share thus begins again with a new shuffle, and a set that
    is too large goes on in the next epoch where it stopped. Which set comes when is a seeded shuffle.

    Args:
        sizes: Units of each shard of each set; units of the sets follow each other.
        weights: Weight of each set.
        seed: Any number.

    Raises:
        UserError: If a set would never be seen.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], weights: Sequence[float], seed: int) -> None:
        super().__init__(seed)
        seeds = shuffled(2**16, seed)[: len(sizes)]  # sets of equal sizes must not be shuffled alike
        self.orders = [Order(own, int(own_seed)) for own, own_seed in zip(sizes, seeds, strict=True)]
        self.first = np.cumsum([0] + [len(order) for order in self.orders])
        self.shares = largest_remainder(int(self.first[-1]), weights)
        if min(self.shares) < 1:
            raise UserError(
                f"Expected at least one sample of each set in an epoch of {len(self)}, got {self.shares} by the "
                f"weights {list(weights)}. Raise the small weights, or leave out those sets."
            )

    def __len__(self) -> int:
        return int(self.first[-1])

    def _permutation(self, epoch: int) -> np.ndarray:
        owners = np.repeat(np.arange(len(self.orders)), self.shares)[shuffled(len(self), self.seed, epoch)]
        units = np.empty(len(self), dtype=np.int64)
        for number, (order, share) in enumerate(zip(self.orders, self.shares, strict=True)):
            units[owners == number] = order.units(epoch * share, share) + self.first[number]
        return units


def largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    """Divides a total into whole shares by weight.

    What rounding leaves goes to the largest fractions; of equal ones the first is served first.
    """
    exact = np.asarray(weights, dtype=np.float64) / float(np.sum(weights)) * total
    shares = np.floor(exact).astype(np.int64)
    for number in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[number] += 1
    return [int(share) for share in shares]
