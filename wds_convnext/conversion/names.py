"""A long list of names in little memory: their bytes in one piece, and where each one ends."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Names:
    """Names as bytes: 8 bytes each and their own. A slice shares memory and pickles alone."""

    content: np.ndarray  # uint8
    ends: np.ndarray  # int64, where each name ends, after where the first one begins

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Self:
        content, ends = bytearray(), array("q", [0])
        for name in names:
            content += name
            ends.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> bytes:
        return self.content[self.ends[number] : self.ends[number + 1]].tobytes()

    def part(self, start: int, stop: int) -> Self:
        """The names [start, stop), numbered from 0."""
        ends = self.ends[start : stop + 1]
        return type(self)(self.content[ends[0] : ends[-1]], ends - ends[0])

    def take(self, order: np.ndarray) -> Self:
        """The names of these numbers, in this order."""
        return self.of(self[number] for number in order.tolist())
