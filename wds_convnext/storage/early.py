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
from wds_convnext.storage.layout import Object, early_path, rounded
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
        self._busy: set[Future] = set()
        self._pool = ThreadPoolExecutor(NUM_RANGES)

    def load(self, objects: Sequence[Object]) -> None:
        """Take over what a run asks for."""
        import numpy as np  # as in the fetcher: of no use before there is a plan

        columns = np.load(self._path / "first.npy", allow_pickle=False)
        self._objects, self._next = objects, 0
        self._ranges = list(map(tuple, columns.T.tolist()))

    @property
    def reserved_bytes(self) -> int:
        """What the ranges may occupy, from when they are asked for until none is needed."""
        return sum(rounded(num_bytes) for _, _, _, num_bytes in self._ranges)

    def tick(self, now: int, present: Collection[int]) -> bool:
        """Begin what is due by now; gives whether anything is on its way.

        Raises:
            ShardError: if something cannot be fetched.
            OSError: if it cannot be written.
        """
        for future in [future for future in self._busy if future.done()]:
            self._busy.discard(future)
            try:
                future.result()
            except Unranged:
                self._end()
        while len(self._busy) < NUM_RANGES and self._next < len(self._ranges):
            time, number, start, num_bytes = self._ranges[self._next]
            if time > now:
                break
            self._next += 1
            found = self._objects[number]
            if (
                num_bytes
                and number not in present
                and not os.path.exists(early_path(found.path, start))
            ):
                self._busy.add(self._pool.submit(self._fetch, found, start, num_bytes))
        if self._ranges and not self._busy and self._next == len(self._ranges):
            self._end()
        return bool(self._busy)

    def _fetch(self, found: Object, start: int, num_bytes: int) -> None:
        path = early_path(found.path, start)
        with self._lend() as store:
            store.fetch(found.url, f"{path}.part", Expected(num_bytes), start=start)
        os.rename(f"{path}.part", path)

    def _end(self) -> None:
        self._ranges, self._next = [], 0
        self._busy.clear()
        with contextlib.suppress(FileNotFoundError):
            (self._path / "first.npy").unlink()
            shutil.rmtree(self._path / "first")
