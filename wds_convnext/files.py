"""Writing files whole or not at all, and JSON that every reader takes."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike, content: bytes | bytearray | Iterable[bytes]) -> None:
    """Write a file, at once or piece by piece, so that it is either whole or as it was."""
    with replacing(path) as file:
        file.writelines([content] if isinstance(content, bytes | bytearray) else content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, buffering: int = -1) -> Iterator[BinaryIO]:
    """Give a temporary file, open for writing, that replaces `path` when the context ends.

    An error within the context removes the temporary file and leaves `path` as it was. A kill
    leaves a `path.<8 hex digits>.tmp` behind.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb", buffering=buffering) as file:
            yield file
            # First the content, then the name: a power cut must not leave an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path)


def read_at(file: int, num_bytes: int, offset: int) -> bytes:
    """So many bytes of an open file, from an offset on; fewer only where the file ends."""
    data = os.pread(file, num_bytes, offset)
    while len(data) < num_bytes:  # a bad sector, or 2 GiB, end a read early
        more = os.pread(file, num_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def unwritable(path: str | os.PathLike, error: OSError | RuntimeError) -> str:
    """The sentences about a file that cannot be written: why, and what to do."""
    if isinstance(error.__context__, OSError):  # torch.save's RuntimeError says less
        error = error.__context__
    number = getattr(error, "errno", None)
    reason = error.strerror if isinstance(error, OSError) and number else str(error).splitlines()[0]
    advice = "Look at the disk that holds it."
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "Free some space."
    elif number in (errno.ENOENT, errno.ENOTDIR):
        advice = "Its folder is gone."
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Make its folder writable."
    return f"{path}: cannot be written ({reason}). {advice}"


def temporary_name(path: str | os.PathLike) -> str:
    """A name next to `path` that no other process uses, nor one that was killed has left."""
    return f"{os.fspath(path)}.{os.urandom(4).hex()}.tmp"


def free_bytes(folder: str | os.PathLike) -> int:
    """Space that is free where a folder is, or will be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


def sync_folder(path: str | os.PathLike) -> None:
    """Make a rename in the folder of `path` survive a power cut."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def format_json(values: dict) -> str:
    """An object as one line of JSON. Numbers that JSON does not have (nan, inf) become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False)
