"""Records of finished steps: what each has found, and which files it left.

A step that is finished is not done again, if its files are still as it left them. A record that is
damaged, or of an older version, is no record: the same step writes the same bytes again.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from wds_convnext.door import read_bounded
from wds_convnext.files import write_atomically

PUBLISHING = "publishing"  # in the staging folder: from now on files move to OUT


def recorded(path: str | os.PathLike, make: Callable[[], dict]) -> dict:
    """The result of a step: as recorded, if its files are as they were left, else made now.

    Args:
        make: does the step. Its result may name `files` next to `path`: by name, as `left_as`.
    """
    record, folder = read_record(path), os.path.dirname(path)
    if record is not None and all(
        _is_as_left(os.path.join(folder, name), *left)
        for name, left in record.get("files", {}).items()
    ):
        return record
    Path(path).unlink(missing_ok=True)  # first, so that no record is of files half made
    record = make()
    text = json.dumps(record).encode()
    write_atomically(path, _digest(text) + b"\n" + text)
    return record


def left_as(content: bytes | bytearray) -> list:
    """Bytes and digest (XXH3-64) of a file's content."""
    return [len(content), xxhash.xxh3_64_hexdigest(content)]


def finished_path(path: str) -> str:
    """Where a finished file of the staging folder stands: there, or already in OUT."""
    folder, name = os.path.split(path)
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, PUBLISHING)):
        return os.path.join(os.path.dirname(folder), name.rsplit(".", 2)[0])  # see Staging.staged
    return path


def read_record(path: str | os.PathLike) -> dict | None:
    """What a finished step has found; None if it is not finished. Its files are not looked at."""
    try:
        digest, text = read_bounded(path).split(b"\n", 1)
        return json.loads(text) if digest == _digest(text) else None
    except (OSError, ValueError):
        return None


def _digest(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()


def _is_as_left(path: str, num_bytes: int, digest: str) -> bool:
    try:
        with open(finished_path(path), "rb") as file:
            if os.fstat(file.fileno()).st_size != num_bytes:
                return False
            found = xxhash.xxh3_64()
            while chunk := file.read(1 << 20):
                found.update(chunk)
    except OSError:
        return False
    return found.hexdigest() == digest
