"""Names of millions of samples in two arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np


class Keys(Sequence[str]):
    """Names of samples, kept as bytes and decoded one at a time.

    Args:
        data: All names in a row, UTF-8.
        ends: (n + 1,) name i is `data[ends[i]:ends[i + 1]]`.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        """Packs names."""
        names = [key.encode("utf-8") for key in keys]
        ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(names), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        name = self.data[int(self.ends[position]) : int(self.ends[position + 1])].tobytes()
        return name.decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        text = self.data[int(self.ends[0]) : int(self.ends[-1])].tobytes()
        ends = (self.ends - self.ends[0]).tolist()
        for start, end in pairwise(ends):
            yield text[start:end].decode("utf-8", "replace")
