"""A quick start: what the first batches read, range by range, until its shards are whole.

Each range is a file of its own, named when all of its bytes are there (`layout.early_path`). Their
reader compares them with the index's checksum; where one differs it waits for the whole shard.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from wds_convnext.storage.failures import Unranged
from wds_convnext.storage.layout import Object, early_path, occupied, rounded
from wds_convnext.storage.transfer import Expected, Store

NUM_RANGES = 64  # on their way at a time


class Early:
    """The ranges that a run asks for in `first.npy`, by the fetcher.

    Args:
        path: of the cache's folder.
        lend: gives a store to one thread for as long as it needs it.
    """

    def __init__(self, path: Path, lend: Callable[[], AbstractContextManager[Store]]):
        self._path, self._lend = path, lend
        self._objects: Sequence[Object] = ()
        # (time, object, start, bytes), by time; the last one has no bytes, and says when all ends
        self._ranges: list[tuple[int, ...]] = []
        self._next = 0
        self._whole: set[int] = set()  # objects that have been here: no range of them is fetched
        self._fetched_bytes = 0  # of the ranges that are here, or on their way
        self.reserved_bytes = 0  # what the ranges may occupy, until none is needed
        self._busy: dict[Future, int] = {}  # -> time from which it may be fetched
        self._pool = ThreadPoolExecutor(NUM_RANGES)

    def load(self, objects: Sequence[Object], present: Collection[int]) -> None:
        """Take over what a run asks for, but for what is here, in whole shards or of its own."""
        import numpy as np  # as in the fetcher: of no use before there is a plan

        folder = self._path / "first"
        for part in folder.glob("*.part"):  # of a fetcher that died
            part.unlink()
        columns = np.load(self._path / "first.npy", allow_pickle=False)
        self._objects, self._next, self._whole = objects, 0, set(present)
        self._ranges = [
            (time, number, start, num_bytes)
            for time, number, start, num_bytes in columns.T.tolist()
            if not (num_bytes and os.path.exists(early_path(objects[number].path, start)))
        ]
        self._fetched_bytes = sum(occupied(entry.path) for entry in os.scandir(folder))
        self._reserve()

    def tick(self, now: int, present: Collection[int]) -> bool:
        """Begin what is due by now; gives whether the first batch's ranges are on their way.

        Until these are here nothing else is begun. Later ranges share the line with whole shards,
        which make them needless.

        Raises:
            ShardError: if something cannot be fetched.
            OSError: if it cannot be written.
        """
        if not self._whole.issuperset(present):
            self._whole.update(present)
            self._reserve()
        for future in [future for future in self._busy if future.done()]:
            self._busy.pop(future, None)  # they may have ended meanwhile
            try:
                future.result()
            except Unranged:
                self._end()
        while len(self._busy) < NUM_RANGES and self._next < len(self._ranges):
            time, number, start, num_bytes = self._ranges[self._next]
            if time > now or (time > self._ranges[0][0] and self._has_first()):
                break
            self._next += 1
            found = self._objects[number]
            if (
                num_bytes
                and number not in self._whole
                and not os.path.exists(early_path(found.path, start))
            ):
                self._busy[self._pool.submit(self._fetch, found, start, num_bytes)] = time
                self._fetched_bytes += rounded(num_bytes)
        if self._ranges and not self._busy and self._next == len(self._ranges):
            self._end()
        return self._has_first()

    def _reserve(self) -> None:
        """Keep room for the ranges that are here and those that may come."""
        coming = (r for r in self._ranges[self._next :] if r[1] not in self._whole)
        self.reserved_bytes = self._fetched_bytes + sum(rounded(r[-1]) for r in coming)

    def _has_first(self) -> bool:
        return bool(self._busy) and self._ranges[0][0] in self._busy.values()

    def _fetch(self, found: Object, start: int, num_bytes: int) -> None:
        path = early_path(found.path, start)
        with self._lend() as store:
            store.fetch(found.url, f"{path}.part", Expected(num_bytes), start=start)
        os.rename(f"{path}.part", path)

    def _end(self) -> None:
        self._ranges, self._next = [], 0
        self._fetched_bytes = self.reserved_bytes = 0
        self._busy.clear()
        with contextlib.suppress(FileNotFoundError):
            (self._path / "first.npy").unlink()
        # Ranges may still be on their way, where a server turned out to have none.
        shutil.rmtree(self._path / "first", ignore_errors=True)
