"""Image files as rows: which files are images, and their bytes."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa

from wds_convnext.conversion.names import Names
from wds_convnext.conversion.source import (
    BATCH_BYTES,
    MAX_BATCH,
    Labels,
    RowBatch,
    SourceSplit,
    as_array,
)
from wds_convnext.door import read_head
from wds_convnext.errors import DataError
from wds_convnext.files import read_at
from wds_convnext.shards.limits import MAX_BYTES
from wds_convnext.shards.sniff import begins_as_image

# Also of formats that are not read: such a row is bad, and says what to convert it to.
_SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
        *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl"),
    ]
)
_NUMBER = r"-?(0|[1-9]\d*)(\.0)?"  # not 007; pandas writes 3.0 where others have no label
_LABELS = 1 << 16  # given at a time
_FOREIGN = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")  # folders that systems leave


def is_visible(name: str) -> bool:
    """Whether a file or folder is meant to be seen: not hidden, nor macOS's `._cat.jpg`."""
    return not name.startswith(".") and name not in _FOREIGN


def has_image_suffix(name: str) -> bool:
    """Whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def is_image(path: str) -> bool:
    """Whether a file is an image by its name, or else by its first bytes."""
    return has_image_suffix(path) or begins_as_image(read_head(path, 12))


def file_size(path: str | bytes) -> int:
    """Bytes of a file; 0 if there is none, as of a link to nothing: such a row is bad."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def read_image(path: str | bytes) -> bytes | DataError:
    """The content of an image file, or why it has none."""
    try:
        # Non-blocking, so that a named pipe does not wait for a writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                return DataError("not a regular file")
            if facts.st_size > MAX_BYTES:
                return DataError(f"too large: {facts.st_size:,} bytes, the limit is {MAX_BYTES:,}")
            return read_at(file, facts.st_size, 0)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:  # the latter for a name with a NUL
        return DataError(f"cannot be read ({getattr(error, 'strerror', None) or error})")


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSplit(SourceSplit):
    """Rows that are image files, by their paths. A `part` has those of its own rows only.

    Attributes:
        folder: what relative paths are relative to.
        codes: int32, the label of each row: a class number, or its index in `values`; -1 for none.
        values: the labels' names; None if they are class numbers.
        first: the row of the first path.
    """

    folder: str
    paths: Names
    codes: np.ndarray
    values: tuple[str, ...] | None = None
    first: int = 0

    def labels(self, start: int, stop: int) -> Iterator[Labels]:
        for begin in range(start, stop, _LABELS):
            yield self._labels(begin, min(begin + _LABELS, stop))

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        images: list[bytes | DataError] = []
        num_bytes = 0
        for row in range(start, stop):
            image = self.read(row)
            images.append(image)
            num_bytes += 0 if isinstance(image, DataError) else len(image)
            if num_bytes >= BATCH_BYTES or len(images) == MAX_BATCH or row == stop - 1:
                first = row + 1 - len(images)
                yield RowBatch(first, images, self._labels(first, row + 1))
                images, num_bytes = [], 0

    def read(self, row: int) -> bytes | DataError:
        """The image of a row, or why it has none."""
        path = self.paths[row - self.first]
        if not path:
            return DataError("has no path")
        if b"://" in path:
            return DataError("a URL: download the images first")
        return read_image(os.path.join(os.fsencode(self.folder), path))

    def locate(self, row: int) -> tuple[str, None]:
        return self.paths[row - self.first].decode(errors="backslashreplace"), None

    def part(self, start: int, stop: int) -> Self:
        own = slice(start - self.first, stop - self.first)
        paths, codes = self.paths.part(own.start, own.stop), self.codes[own]
        return replace(self, paths=paths, codes=codes, first=start)

    def _labels(self, start: int, stop: int) -> Labels:
        codes = self.codes[start - self.first : stop - self.first]
        if self.values is None:
            return codes
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), [*self.values])


def file_split(
    chunks: Iterable[tuple[pa.Array, pa.Array]],
    *,
    folder: str,
    name: str,
    numbers_are_text: bool = False,
) -> FileSplit:
    """Rows of paths and labels, given in chunks, as image files.

    Args:
        folder: what relative paths are relative to.
        numbers_are_text: labels are all text; if all are whole numbers, they are class numbers.
    Raises:
        DataError: if labels are neither all integers nor all names.
    """
    known: dict[str | int, int] = {}  # labels, each with its code
    coded: list[np.ndarray] = []
    paths = Names.of(_coded_paths(chunks, known, coded))
    codes = np.concatenate([np.zeros(0, np.int32), *coded])
    values = [*known]
    if numbers_are_text and all(re.fullmatch(_NUMBER, str(value)) for value in values):
        values = [int(str(value).removesuffix(".0")) for value in values]
    if len({isinstance(value, str) for value in values}) > 1:
        raise DataError("labels are integers in some rows and names in others. Name one kind.")
    names = None
    if values and isinstance(values[0], str):
        names = tuple(map(str, values))
    elif values:
        if max(map(abs, map(int, values))) >= 1 << 31:
            raise DataError(f"a label of {max(values):,}; expected class numbers from 0.")
        codes = np.array([*values, -1], np.int32)[codes]
    num_bytes, digest = 0, hashlib.sha256()
    for row in range(len(paths)):
        size = file_size(os.path.join(os.fsencode(folder), paths[row]))
        label = b"" if codes[row] < 0 else str(names[codes[row]] if names else codes[row]).encode()
        digest.update(b"%s\0%s\0%d\0" % (paths[row], label, size))
        num_bytes += size
    return FileSplit(
        name=name,
        num_rows=len(paths),
        num_bytes=num_bytes,
        digest=digest.hexdigest()[:16],
        folder=folder,
        paths=paths,
        codes=codes,
        values=names,
    )


def _coded_paths(
    chunks: Iterable[tuple[pa.Array, pa.Array]], known: dict, coded: list[np.ndarray]
) -> Iterator[bytes]:
    """The paths; the labels' codes go to `coded`, a chunk at a time, and labels to `known`."""
    for paths, labels in chunks:
        labels = as_array(labels)
        if pa.types.is_boolean(labels.type):
            labels = labels.cast(pa.int8())
        encoded = labels.dictionary_encode()
        own = [known.setdefault(value, len(known)) for value in encoded.dictionary.to_pylist()]
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        coded.append(np.array([*own, -1], np.int32)[numbers])
        for path in as_array(paths).cast(pa.binary()).to_pylist():
            yield path or b""
