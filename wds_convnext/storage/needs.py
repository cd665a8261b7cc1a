"""What a run needs when, as far as it has come: the plan and the clock in a cache's folder."""

import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wds_convnext.storage.schedule import NextUses


class Needs:
    """The next use of each object, now.

    Args:
        path: of the cache's folder.
    """

    def __init__(self, path: Path):
        self._path = path
        self._uses: NextUses | None = None
        self.is_settled = True  # which objects stay; there is nothing to settle without a plan
        self.now = -1
        self.times: list[int] = []  # per object; `sys.maxsize`: never
        self.order: list[int] = []  # objects, by the beginning of their next use
        self.staying: set[int] = set()  # objects that are not evicted to fetch ahead

    @property
    def are_known(self) -> bool:
        """Whether there is a plan."""
        return self._uses is not None

    def load(self, num_objects: int) -> None:
        """Take over the plan, which numbers so many objects."""
        import numpy as np

        from wds_convnext.storage.schedule import NextUses, Plan

        object, first, last = np.load(self._path / "plan.npy", allow_pickle=False)
        self._uses = NextUses(Plan(object, first, last), num_objects)
        self.now, self.staying, self.is_settled = -1, set(), False

    def update(self, num_objects: int) -> None:
        """Look at the clock. Without a plan none of so many objects is needed."""
        if self._uses is None:
            self.times = [sys.maxsize] * num_objects
            return
        try:
            clock = (self._path / "clock").read_bytes()
            now = min(struct.unpack(f"<{len(clock) // 8}q", clock))
        except (OSError, ValueError, struct.error):
            now = 0
        if now > self.now:  # a rank that was started again may be behind what has gone
            self.now = now
            self.times = self._uses.at(now).tolist()
            self.order = self._uses.begins.argsort(kind="stable").tolist()
            self.staying = set(self._uses.stays(now).nonzero()[0].tolist())

    def to_go(self, objects: Iterable[int], *, before: int) -> list[int]:
        """Which of these objects may go for one that is needed at a time, in this order.

        What is in use goes last, what stays before it, else first what is needed last.

        Args:
            before: that time; -1 if a reader waits for it, for which everything may go.
        """
        times, staying, now = self.times, self.staying, self.now
        going = [n for n in objects if before < 0 or (times[n] > before and n not in staying)]
        return sorted(going, key=lambda n: (times[n] <= now, n in staying, -times[n]))

    def settle(self, sizes: list[int], cache_bytes: int) -> None:
        """Settle which objects stay between their uses; 60 epochs of 1,024 shards take 0.2 s."""
        import numpy as np

        assert self._uses is not None
        self.is_settled = True
        self._uses.settle(np.array(sizes), cache_bytes)
        self.staying = set(self._uses.stays(self.now).nonzero()[0].tolist())
