"""Writing files whole or not at all."""

import os


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that it is either whole or as it was: temp file, fsync, rename."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path)


def sync_folder(path: str | os.PathLike) -> None:
    """Make a rename in the folder of `path` survive a power cut."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
