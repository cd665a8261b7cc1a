"""The index of a split: a fixed record per sample, in one file that every process maps.

`train.index` stands next to `train.json`. After the first bytes come RECORD of every sample in the
order of the shards, then the footer: JSON that lists the shards (path from the file's own folder,
samples, bytes, stamp), and its length. So the file says what it was made from, and is made again
when that differs.

A record is read in 1 us, whatever the number of samples; nothing is parsed when it opens but the
list of shards. Pages that were read are given back to the system every few thousand records, so
resident memory stays flat even where an index of a gigabyte is read in a random order.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from wds_convnext.door import check_shape, count
from wds_convnext.shards.spec import Shard

_MAGIC = b"wds_convnext index 1\n\0\0\0"
_LENGTH = struct.Struct("<Q")
_MAX_FOOTER = 1 << 28  # bytes; some million shards
_RELEASE_EVERY = 4096  # records; at most so many pages of 4 KiB are resident

RECORD = np.dtype(
    [
        ("start", "<u8"),  # of the first member's header in the shard
        ("checksum", "<u8"),  # of image, label and place, see `checksum`; 0 without HAS_CHECKSUM
        ("num_bytes", "<u8"),  # of all members together, headers and padding included
        ("image_offset", "<u8"),  # of the image's data, from `start`
        ("label_offset", "<u8"),  # of the label's data, from `start`
        ("image_bytes", "<u4"),
        ("label_bytes", "<u4"),
        ("label", "<i4"),
        ("flags", "<u4"),
    ]
)
_STRUCT = struct.Struct("<QQQQQIIiI")
assert _STRUCT.size == RECORD.itemsize

HAS_CHECKSUM = 1  # flags
JSON_LABEL = 2  # the label stands in a .json member, not in .cls
DECODED = 4  # the image was decoded once, whole, by the strict decoder


class Record(NamedTuple):
    """What the index holds of one sample, as in RECORD."""

    start: int
    checksum: int
    num_bytes: int
    image_offset: int
    label_offset: int
    image_bytes: int
    label_bytes: int
    label: int
    flags: int

    @property
    def places(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(offset in the shard, bytes) of the image, and of the label."""
        return (
            (self.start + self.image_offset, self.image_bytes),
            (self.start + self.label_offset, self.label_bytes),
        )

    def pack(self) -> bytes:
        """The record as it stands in the file.

        Raises:
            struct.error: if a number does not fit, as for an image of 4 GiB.
        """
        return _STRUCT.pack(*self)


def checksum(image: bytes | memoryview, label: int, sample: int) -> int:
    """64 bits over an image's bytes, its label and the sample's number in its shard.

    XXH3 (Y. Collet, xxHash) seeded with label and number; 2.4 us per 110 kB.
    """
    seed = (int(sample) << 20 | int(label) & 0xFFFFF) & 0xFFFFFFFFFFFFFFFF
    return xxhash.xxh3_64_intdigest(image, seed=seed)


def mark_decoded(records: bytes) -> bytes:
    """Packed records, each saying that its image has decoded."""
    marked = np.frombuffer(records, RECORD).copy()
    marked["flags"] |= DECODED
    return marked.tobytes()


def stamp(shard: Shard) -> str:
    """What identifies a shard among those of its size: its SHA-256, else its last change."""
    if shard.sha256 is not None:
        return shard.sha256
    try:
        return f"changed {os.stat(shard.path).st_mtime_ns}"
    except OSError:
        return "missing"


def index_content(
    records: Iterable[bytes], paths: Iterable[str], shards: Iterable[Shard], *, checksums: bool
) -> Iterator[bytes]:
    """An index file, piece by piece.

    Args:
        records: packed, of each shard.
        paths: of the shards, absolute or from the folder that the index will stand in.
        shards: looked at after the last of the records, so they may be counted meanwhile.
        checksums: whether every record has one.
    """
    yield _MAGIC
    yield from records
    yield _encode_footer(paths, shards, checksums=checksums)


def _encode_footer(paths: Iterable[str], shards: Iterable[Shard], *, checksums: bool) -> bytes:
    facts = [
        [path, shard.num_samples, shard.num_bytes, stamp(shard)]
        for path, shard in zip(paths, shards, strict=True)
    ]
    content = {"checksums": checksums, "shards": facts}
    footer = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return footer + _LENGTH.pack(len(footer))


def _check_facts(facts: Any) -> str:
    is_right = isinstance(facts, list) and len(facts) == 4 and not count(facts[1])
    return "" if is_right and isinstance(facts[0], str) else "path, samples, bytes and stamp"


class IndexFile:
    """An index file, mapped: which shards it was made from, and where their records start.

    Args:
        path: of the file; what it holds may be given instead of it.
    Raises:
        ValueError: if it is not a whole index file.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str, content: bytes | None = None):
        self.path, self._bytes = path, content
        self.content = content if content is not None else _map(path)
        footer, end = self._footer()
        self.has_checksums = bool(footer.get("checksums"))
        folder = os.path.dirname(os.path.abspath(path))
        self._folders: dict[str, str] = {}
        self._shards: dict[str, tuple] = {}
        offset = len(_MAGIC)
        for name, num_samples, num_bytes, its_stamp in footer["shards"]:
            key = os.path.join(folder, name)
            if "/" in name:
                key = os.path.normpath(key)
            self._shards[key] = num_samples, num_bytes, its_stamp, offset
            offset += num_samples * RECORD.itemsize
        if offset != end:
            raise ValueError(f"records up to byte {end:,}, expected {offset:,}")

    def _footer(self) -> tuple[dict, int]:
        size = len(self.content)
        if size < len(_MAGIC) + _LENGTH.size or self.content[: len(_MAGIC)] != _MAGIC:
            raise ValueError("not an index of this version")
        (length,) = _LENGTH.unpack_from(self.content, size - _LENGTH.size)
        end = size - _LENGTH.size - length
        if length > _MAX_FOOTER or end < len(_MAGIC):
            raise ValueError(f"a footer of {length:,} bytes")
        footer = json.loads(self.content[end : -_LENGTH.size].decode("utf-8", "surrogateescape"))
        check_shape(footer, {"shards": [_check_facts]})
        return footer, end

    def find(self, shard: Shard) -> tuple[int, int] | None:
        """(samples, offset of the first record) of a shard; None if it was another shard then.

        Args:
            shard: its number of samples may be -1: not known.
        """
        num_samples, num_bytes, its_stamp, offset = self._shards.get(
            self._absolute(shard.path), (None, None, None, None)
        )
        if num_samples is None or shard.num_samples not in (-1, num_samples):
            return None
        if num_bytes != shard.num_bytes or its_stamp != stamp(shard):
            return None
        return num_samples, offset

    def _absolute(self, path: str) -> str:
        """A shard's absolute path; its folder is resolved once for all shards."""
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.abspath(folder)
        return f"{self._folders[folder]}/{name}"

    def records(self, num_samples: int, offset: int) -> np.ndarray:
        """The records at a place that `find` gave, RECORD (num_samples,), read-only."""
        return np.frombuffer(self.content, RECORD, count=num_samples, offset=offset)

    def __reduce__(self) -> tuple[type["IndexFile"], tuple[str, bytes | None]]:
        return IndexFile, (self.path, self._bytes)


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(content, "madvise"):
        content.madvise(mmap.MADV_RANDOM)
    return content


def open_index(path: str) -> IndexFile | None:
    """An index file, or None if there is none that is whole."""
    try:
        return IndexFile(path)
    except (OSError, ValueError, RecursionError):
        return None


class SampleIndex:
    """The records of a data set's samples, by shard and number in it, from one or more files.

    Args:
        shards: in the data set's order.
        places: for each shard the file that holds its records, and the offset of the first.
    """

    def __init__(self, shards: Sequence[Shard], places: Sequence[tuple[IndexFile, int]]):
        self.sizes = [shard.num_samples for shard in shards]
        self.places = list(places)
        self._num_read = 0

    def record(self, shard: int, sample: int) -> Record:
        """The record of one sample."""
        file, offset = self.places[shard]
        record = Record._make(_STRUCT.unpack_from(file.content, offset + sample * RECORD.itemsize))
        self._num_read += 1
        if self._num_read % _RELEASE_EVERY == 0:
            self._release()
        return record

    def records(self, shard: int) -> np.ndarray:
        """All records of one shard, RECORD (num_samples,), read-only."""
        file, offset = self.places[shard]
        return file.records(self.sizes[shard], offset)

    def labels(self) -> np.ndarray:
        """The label of every sample, int32 (num_samples,); -1 where it cannot be used."""
        labels = np.empty(sum(self.sizes), dtype=np.int32)
        start = 0
        for shard, size in enumerate(self.sizes):
            labels[start : start + size] = self.records(shard)["label"]
            start += size
        self._release()
        return labels

    @property
    def has_checksums(self) -> bool:
        """Whether every sample's bytes can be compared with a checksum."""
        return all(file.has_checksums for file, _ in self.places)

    def _release(self) -> None:
        """Unmap the pages that were read; they come back when they are read again."""
        for file in {id(file): file for file, _ in self.places}.values():
            if hasattr(file.content, "madvise"):
                file.content.madvise(mmap.MADV_DONTNEED)
