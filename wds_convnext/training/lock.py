"""A lock on a run's folder, which dies with the process that holds it.

It is a POSIX record lock: unlike flock's, loader workers do not inherit it, so it ends with the
trainer even if they outlive it for a moment. NFS passes it on between machines, unless it is
mounted with `nolock` or `local_lock`; then it keeps out only runs of one machine.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from wds_convnext.errors import UsageError

NAME = "run.lock"


@contextlib.contextmanager
def locked(folder: Path, *, warn: Callable[[str], None]) -> Iterator[None]:
    """Within this context no other process can lock the folder.

    Raises:
        UsageError: if one has.
        OSError: if the folder cannot be written to.
    """
    path = folder / NAME
    file = _open_locked(path, warn=warn)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()  # still locked: who opened it meanwhile finds another file, or none
        with contextlib.suppress(OSError):  # the disk may be full
            file.close()


def _open_locked(path: Path, *, warn: Callable[[str], None]) -> TextIO:
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                warn(
                    f"{path}: this file system has no locks ({error.strerror}), so nothing keeps "
                    "a second run out of the folder."
                )
                return file
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UsageError(
                f"{path.parent}: its run is running, {holder}. Wait for its end, stop it, or "
                "choose another --out."
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the run that had locked it has deleted it
