"""Spill files: how rows reach their shards in flat memory.

One pass over the input copies the images into spill files, the rows of every few megabytes
grouped by shard, and an index. Then each shard reads its own from all of them, in order. So the
disk is written in long runs and read in runs, and memory holds one group at a time.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import xxhash

from wds_convnext.conversion.records import left_as
from wds_convnext.errors import ShardError
from wds_convnext.files import read_at, replacing, write_atomically

_GROUP_BYTES = 8 << 20  # images held in memory until they are grouped by shard
_INDEX_DTYPE = np.dtype(
    [
        ("shard", np.int32),
        ("place", np.int32),
        ("row", np.int64),
        ("offset", np.int64),
        ("num_bytes", np.int32),
        ("label", np.int32),
        ("extension", "S4"),
        ("source", np.uint64),  # see `shrink`
    ]
)


class SpillWriter(ExitStack):
    """Writes a spill file `path` and its index `path.npy`, sorted by shard and place.

    `files` says in the end what was left, as in `records`. The file has a name of its own until
    then, as in `tarwriter`.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self._images: list[bytes | memoryview] = []
        self._pending: list[tuple] = []
        self._pending_bytes = 0
        self._offset = 0
        self._indexes: list[np.ndarray] = []
        self._digest = xxhash.xxh3_64()
        self._file = self.enter_context(replacing(path, buffering=1 << 20))
        self.push(self._finish)

    def write(
        self,
        image: bytes | memoryview,
        *,
        shard: int,
        place: int,
        row: int,
        label: int,
        extension: str,
        source: int,
    ) -> None:
        self._pending.append((shard, place, row, 0, len(image), label, extension, source))
        self._images.append(image)
        self._pending_bytes += len(image)
        if self._pending_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        index = np.array(self._pending, dtype=_INDEX_DTYPE)
        order = np.argsort(index["shard"], kind="stable")
        for i in order.tolist():
            self._file.write(self._images[i])
            self._digest.update(self._images[i])
        index = index[order]
        sizes = index["num_bytes"].astype(np.int64)
        index["offset"] = self._offset + np.cumsum(sizes) - sizes
        self._offset += self._pending_bytes
        self._indexes.append(index)
        self._images.clear()
        self._pending.clear()
        self._pending_bytes = 0

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        self._flush()
        index = np.concatenate(self._indexes)
        content = io.BytesIO()
        np.save(content, index[np.lexsort((index["place"], index["shard"]))])
        write_atomically(self.path + ".npy", content.getvalue())
        name = os.path.basename(self.path)
        self.files = {
            name: [self._offset, self._digest.hexdigest()],
            name + ".npy": left_as(content.getvalue()),
        }


def read_spilled(paths: Sequence[str], shard: int) -> Iterator[tuple[bytes, np.void]]:
    """The images of one shard in the order of their places, each with its index entry."""
    indexes, owners = [], []
    for number, path in enumerate(paths):
        index = np.load(path + ".npy", mmap_mode="r")
        begin, end = np.searchsorted(index["shard"], [shard, shard + 1])
        indexes.append(np.array(index[begin:end]))
        owners.append(np.full(end - begin, number, dtype=np.int32))
    entries, owner = np.concatenate(indexes), np.concatenate(owners)
    order = np.argsort(entries["place"])
    files = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        for i in order.tolist():
            entry = entries[i]
            image = read_at(files[owner[i]], int(entry["num_bytes"]), int(entry["offset"]))
            if len(image) < entry["num_bytes"]:
                raise ShardError(
                    f"{paths[owner[i]]}: it ends before byte {entry['offset'] + len(image):,}, "
                    "cut short since it was written. Run the same command again."
                )
            yield image, entry
    finally:
        for file in files:
            os.close(file)
