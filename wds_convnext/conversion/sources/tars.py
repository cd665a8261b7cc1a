"""Members of a tar file by offset, plain or compressed (gzip, bzip2, xz).

A compressed tar can only be read from its start on: its members are listed in one pass and read in
another, both in the order in which they stand. Neither unpacks anything to the disk.
"""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

from wds_convnext.conversion.sources.images import has_image_suffix
from wds_convnext.conversion.sources.places import Entry, is_shown
from wds_convnext.door import read_head
from wds_convnext.errors import DataError, UsageError
from wds_convnext.files import read_at
from wds_convnext.shards.headers import BLOCK, walk_headers
from wds_convnext.shards.limits import MAX_BYTES
from wds_convnext.shards.sniff import begins_as_image

_OPEN: dict[bytes, Callable] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, OverflowError, ValueError)
_CHUNK = 1 << 20


def is_tar(path: str) -> bool:
    """Whether a file is a tar, plain or compressed, by its first bytes."""
    try:
        with (_decompressor(path) or open)(path, "rb") as file:
            return file.read(BLOCK)[257:262] == b"ustar"
    except _UNREADABLE:
        return False


def _decompressor(path: str) -> Callable | None:
    head = read_head(path, 6)
    return next((opener for start, opener in _OPEN.items() if head.startswith(start)), None)


class TarArchive:
    """A tar file, open: its members, and their bytes by place.

    Attributes:
        is_sequential: whether it is compressed, so that reading back begins at its start again.
    """

    def __init__(self, path: str):
        self.path = path
        decompressor = _decompressor(path)
        self.is_sequential = decompressor is not None
        self._open = partial(decompressor or open, path, "rb")
        self._file: BinaryIO = self._open()
        self._at = 0

    def __enter__(self) -> "TarArchive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entries(self) -> Iterator[Entry]:
        """The files that are meant to be seen, in the order of the tar.

        Raises:
            UsageError: if the tar is damaged or ends early.
        """
        end = 0
        try:
            for header in walk_headers(self._read):
                end = header.end
                name = os.fsencode(header.name)
                if not header.is_file or not is_shown(name):
                    continue
                size = header.num_bytes
                is_image = has_image_suffix(header.name) or begins_as_image(
                    self._read(min(size, 12), header.offset)
                )
                yield Entry(name, header.offset, size, size, is_image=is_image)
            # Where the last block is missing, so may be members before it.
            if len(self._read(BLOCK, end)) < BLOCK:
                raise ValueError("it has no end-of-archive mark")
        except _UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{self.path}: not a whole tar file: {reason}. Copy it again."
            ) from None

    def read(self, entry: Entry) -> bytes:
        """The bytes of a member.

        Raises:
            DataError: if they are not there, or more than an image has.
        """
        if entry.num_bytes > MAX_BYTES:
            raise DataError(f"too large: {entry.num_bytes:,} bytes, the limit is {MAX_BYTES:,}")
        try:
            data = self._read(entry.num_bytes, entry.offset)
        except _UNREADABLE as error:
            raise DataError(f"cannot be read ({error})") from None
        if len(data) < entry.num_bytes:
            raise DataError("cut short: the tar ends before it")
        return data

    def _read(self, num_bytes: int, at: int) -> bytes:
        """So many bytes from an offset on, fewer where the tar ends."""
        if not self.is_sequential:
            return read_at(self._file.fileno(), num_bytes, at)
        if at < self._at:
            self._file.close()
            self._file, self._at = self._open(), 0
        while self._at < at:
            skipped = len(self._file.read(min(_CHUNK, at - self._at)))
            if not skipped:
                return b""
            self._at += skipped
        data = self._file.read(num_bytes)
        self._at += len(data)
        return data
