"""The door through which files of our own kinds come in: manifests, plans, records, lists.

They are small, but may be damaged, forged or something else of that name. Whatever passes is of
bounded size, text that can be written back, and of the types that its reader expects.
"""

import json
import os
import stat
from typing import Any

MAX_BYTES = 1 << 28
MAX_COUNT = 1 << 53  # of samples or bytes: sums of them still fit 64 bits


def read_bounded(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file of bounded size.

    Raises:
        ValueError: if it is larger, or not a file.
        OSError: if it cannot be read.
    """
    # Non-blocking, so that a named pipe does not wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a regular file")
        if facts.st_size > max_bytes:
            raise ValueError(f"{facts.st_size:,} bytes, the limit is {max_bytes:,}")
        return file.read(max_bytes)


def read_head(path: str | os.PathLike, num_bytes: int) -> bytes:
    """The first bytes of a regular file; nothing of a file that is not one or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return file.read(num_bytes) if is_file else b""
    except (OSError, ValueError):  # the latter for a name with a NUL
        return b""


def read_json(path: str | os.PathLike, shape: Any, *, max_bytes: int = MAX_BYTES) -> Any:
    """What a JSON file holds, of a shape as in `check_shape`.

    Raises:
        ValueError: what was found, and what was expected.
        OSError: if it cannot be read.
    """
    return parse_json(read_bounded(path, max_bytes=max_bytes), shape)


def parse_json(content: bytes | str, shape: Any) -> Any:
    """The value of a JSON text, of a shape as in `check_shape`.

    Raises:
        ValueError: what was found, and what was expected.
    """
    try:
        value = json.loads(content)
        # What cannot be written back is refused: NaN, infinity, half of a surrogate pair.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_shape(value, shape)
    return value


def check_shape(value: Any, shape: Any, what: str = "found") -> None:
    """Raise ValueError if a JSON value is not of a shape.

    Args:
        shape: a dict of shapes by key (`"key?"` may be missing or null), a list of the one shape
            of all elements, or a function that says what is expected unless the value is right.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{what} {_shown(value)}, expected an object")
        for name, inner in shape.items():
            key = name.removesuffix("?")
            if value.get(key) is None and key == name:
                raise ValueError(f"no {key}")
            if value.get(key) is not None:
                check_shape(value[key], inner, key)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{what} {_shown(value)}, expected a list")
        for element in value:
            check_shape(element, shape[0], f"an entry of {what}")
    elif expected := shape(value):
        raise ValueError(f"{what} {_shown(value)}, expected {expected}")


def text(value: Any) -> str:
    return "" if isinstance(value, str) else "text"


def count(value: Any) -> str:
    is_count = type(value) is int and 0 <= value <= MAX_COUNT
    return "" if is_count else "a whole number from 0 on"


def base_name(value: Any) -> str:
    """A name that stays in the folder of the file that states it."""
    is_name = isinstance(value, str) and value not in ("", ".", "..")
    return "" if is_name and not {"/", "\0"} & set(value) else "the name of a file in this folder"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "…"
