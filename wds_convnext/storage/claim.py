"""A cache's folder, of which each process that opens one has its own."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

from wds_convnext.errors import UsageError
from wds_convnext.storage.layout import COUNTS, READS

_MAX_CACHES = 64  # in one folder at a time


def claim(root: Path) -> tuple[Path, int]:
    """A folder under `root` that no other process uses, the first that is free; and its lock.

    What an earlier process has left in it is taken away, but for the shards.

    Raises:
        UsageError: if there are too many.
        OSError: if it cannot be written.
    """
    for number in range(_MAX_CACHES):
        path = root / f"cache-{number}"
        (path / "wanted").mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # POSIX record locks: not inherited by loader workers, so they end with us.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                continue
            raise
        _await_end_of_fetcher(path)
        _clear(path)
        return path, lock
    raise UsageError(
        f"--cache-dir {root}: {_MAX_CACHES} other processes have their caches there. Choose "
        "another."
    )


def _await_end_of_fetcher(path: Path) -> None:
    """Wait for the fetcher of a process that was killed: it sees that within a moment."""
    serving = os.open(path / "serving", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(serving, fcntl.LOCK_EX)
    finally:
        os.close(serving)


def _clear(path: Path) -> None:
    for name in ("objects.json", "plan.npy", "first.npy", "clock", "failed", "folders.json"):
        (path / name).unlink(missing_ok=True)
    for wanted in (path / "wanted").iterdir():
        wanted.unlink()
    for pattern in ("*.tmp", "incoming-*", "placed-*", "first"):
        for rest in path.glob(pattern):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    (path / "counts").write_bytes(COUNTS.pack(0, 0, 0, 0, 0))
    (path / "reads").write_bytes(READS.pack(0, 0, 0.0))
