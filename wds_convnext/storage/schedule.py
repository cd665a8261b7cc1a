"""Which object is needed when, and which may go: eviction by the furthest next use.

A time is a number of batches that were handed over. The order of a run is arithmetic, so the uses
of every object are known to the end of the run: what is fetched ahead is needed, and what goes
first is what is needed last (L. Belady 1966; for objects of one size no other choice fetches less).
"""

import contextlib
import heapq
from dataclasses import dataclass

import numpy as np

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Plan:
    """The uses of objects, by object and time; those of one object do not overlap.

    Args:
        object: numbers of objects, int64 (num_uses,).
        first, last: the times at which a use begins and ends (inclusive), int64 (num_uses,).
    """

    object: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, object: np.ndarray, first: np.ndarray, last: np.ndarray) -> "Plan":
        """The plan of uses in any order; those of one object that overlap or touch become one."""
        order = np.lexsort((first, object))
        object, first, last = (np.asarray(a, np.int64)[order] for a in (object, first, last))
        if not len(object):
            return cls(object, first, last)
        low = first.min()
        apart = int(last.max() - low) + 2  # times of different objects must not meet
        ends = np.maximum.accumulate(last - low + object * apart) - object * apart + low
        begins = np.ones(len(object), bool)
        begins[1:] = (object[1:] != object[:-1]) | (first[1:] > ends[:-1] + 1)
        begin = begins.nonzero()[0]
        return cls(object[begin], first[begin], np.maximum.reduceat(ends, begin))

    def begun(self, ahead: int) -> "Plan":
        """This plan with uses that begin so much earlier, as of readers that are ahead."""
        return Plan.of(self.object, self.first - ahead, self.last)

    def peak_bytes(self, sizes: np.ndarray) -> int:
        """The most bytes that are in use at one time, the live set.

        Args:
            sizes: bytes of the objects, int64 (num_objects,).
        """
        if not len(self.object):
            return 0
        nbytes = sizes[self.object]
        # Of one time the ends come first (lexsort is stable): what has gone makes room.
        order = np.lexsort((np.concatenate([self.last + 1, self.first]),))
        return int(np.cumsum(np.concatenate([-nbytes, nbytes])[order]).max())


class NextUses:
    """When each object is needed next, as time goes on, and which stay until then.

    Args:
        num_objects: those that the plan does not name are never needed.
    """

    def __init__(self, plan: Plan, num_objects: int):
        self.plan = plan
        starts = np.searchsorted(plan.object, np.arange(num_objects + 1))
        self._use, self._end = starts[:-1].copy(), starts[1:]
        self._first = np.append(plan.first, NEVER)
        self._last = np.append(plan.last, NEVER)
        self._is_fetched = np.ones(len(self._first), bool)

    def settle(self, sizes: np.ndarray, cache_bytes: int) -> None:
        """Settle which objects stay between their uses: those that `simulate` does not evict.

        Who fetches ahead as far as there is something to evict that is needed later, fetches more
        often than that in all (P. Cao et al. 1995, "aggressive" and "conservative" prefetching).
        """
        with contextlib.suppress(ValueError):  # too small a cache: nothing can be settled
            self._is_fetched[:-1] = simulate(self.plan, sizes, cache_bytes)

    def stays(self, now: int) -> np.ndarray:
        """Which objects wait for a use up to which they are to stay, bool, at the time of `at`."""
        return (self._first[self._use] > now) & ~self._is_fetched[self._use] & self._is_left

    @property
    def begins(self) -> np.ndarray:
        """When the use of each object that `at` has found begins, or began, int64."""
        return np.where(self._is_left, self._first[self._use], NEVER)

    @property
    def _is_left(self) -> np.ndarray:
        return self._use < self._end

    def at(self, now: int) -> np.ndarray:
        """The next time of each object, int64: `now` while it is in use, NEVER after its last.

        Times must not go back.
        """
        while True:
            passed = self._is_left & (self._last[self._use] < now)
            if not passed.any():
                break
            self._use[passed] += 1
        return np.maximum(self.begins, now)


def simulate(plan: Plan, sizes: np.ndarray, cache_bytes: int, *, lru: bool = False) -> np.ndarray:
    """Which uses of a plan find their object missing, in a cache that begins empty.

    Args:
        sizes: bytes of the objects, int64 (num_objects,).
        lru: evict what was not used for longest, instead of what is not needed for longest.
    Returns:
        bool (num_uses,), in the plan's order.
    Raises:
        ValueError: if the cache is smaller than the live set.
    """
    following = np.append(plan.first[1:], NEVER)
    following[np.append(plan.object[1:] != plan.object[:-1], True)] = NEVER
    is_missing = np.zeros(len(plan.object), bool)
    held: dict[int, int] = {}  # object -> its newest use
    in_use: list[tuple[int, int]] = []  # (last, use)
    idle: list[tuple[int, int]] = []  # (what goes first, use)
    used = 0
    for use in np.argsort(plan.first, kind="stable").tolist():
        while in_use and in_use[0][0] < plan.first[use]:
            last, done = heapq.heappop(in_use)
            heapq.heappush(idle, (last if lru else -int(following[done]), done))
        number = int(plan.object[use])
        if number not in held:
            is_missing[use] = True
            used += int(sizes[number])
        held[number] = use
        while used > cache_bytes:
            if not idle:
                raise ValueError(f"{used:,} bytes in use, the cache has {cache_bytes:,}")
            _, victim = heapq.heappop(idle)
            if held.get(int(plan.object[victim])) == victim:  # else it is in use again
                used -= int(sizes[plan.object[victim]])
                del held[int(plan.object[victim])]
        heapq.heappush(in_use, (int(plan.last[use]), use))
    return is_missing
