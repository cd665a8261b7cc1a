"""Image files as rows: which files are images, and their bytes."""

import os
import stat
from collections.abc import Callable, Iterator

from wds_convnext.conversion.source import BATCH_BYTES, MAX_BATCH, Labels, RowBatch
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


def read_files(
    path_of: Callable[[int], str | bytes],
    labels_of: Callable[[int, int], Labels],
    start: int,
    stop: int,
) -> Iterator[RowBatch]:
    """Rows [start, stop), each an image file, a few megabytes at a time."""
    images: list[bytes | DataError] = []
    num_bytes = 0
    for row in range(start, stop):
        image = read_image(path_of(row))
        images.append(image)
        num_bytes += 0 if isinstance(image, DataError) else len(image)
        if num_bytes >= BATCH_BYTES or len(images) == MAX_BATCH or row == stop - 1:
            first = row + 1 - len(images)
            yield RowBatch(first, images, labels_of(first, row + 1))
            images, num_bytes = [], 0
