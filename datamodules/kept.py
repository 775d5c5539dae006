"""What was read of samples and decoded of pictures, kept in memory where the same ones are asked for again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

MIB = 2**20
T = TypeVar("T")


class Kept(Generic[T]):
    """Values by key, up to a number of bytes; what comes later is made anew each time.

    A copy in another process begins empty.

    Args:
        limit: Bytes; 0 keeps nothing.
        size: Bytes of a value.
    """

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self.limit, self.size, self.used = limit, size, 0
        self._values: dict[Hashable, T] = {}

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[int, Callable[[T], int]]]:
        return type(self), (self.limit, self.size)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the value of a key, which is made if it is not kept; an error of `make` keeps nothing."""
        if key in self._values:
            return self._values[key]
        value = make()
        size = self.size(value) if self.limit else 0
        if size and self.used + size <= self.limit:
            self._values[key] = value
            self.used += size
        return value
