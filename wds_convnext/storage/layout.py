"""What stands in a cache's folder, and how its readers wait for what does not stand there yet.

    lock              held by the process that opened the cache, and ends with it
    serving           held by the fetcher, which may outlive that process for a moment
    objects.json      the objects that may be asked for: where from, how large, SHA-256
    first.npy, first/ what the first batches read of shards that are not here yet, file by file
    plan.npy, clock   when which is needed (`schedule`), and how far each rank on this node is
    wanted/TOKEN      a reader waits for this object
    failed            why the fetcher gave up, one line
    counts            what it did
    reads             how many reads found their bytes at once, how many waited, and how long
    folders.json      which local folder stands for which URL, for other ranks of the node
    FOLDER/           a remote folder: .origin says which; manifests and indexes (or links to local
                      ones), and those of its shards that are here now. They are published by
                      rename, so what has its name is whole; what is read is locked (shared), so
                      that it is not evicted meanwhile

Whatever is killed, and whenever: nothing here has to be repaired.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from multiprocessing import parent_process
from typing import NamedTuple

from wds_convnext.errors import ShardError
from wds_convnext.urls import join

ORIGIN = ".origin"
GAVE_UP = 3  # the fetcher's exit code: `failed` says why; starting it again would not help
COUNTS = struct.Struct("<5q")  # bytes, requests, retries, objects published, objects evicted
READS = struct.Struct("<qqd")  # reads that found their bytes, reads that waited, their seconds
MARGIN = 1 << 16  # bytes kept for small files that come and go
_POLL_S = 0.01
_BLOCK = 4096
_NOTE_EVERY = 64  # reads of a process, since noting one takes a lock


class Object(NamedTuple):
    """An object of a store, and the path at which it stands when it is here."""

    url: str
    path: str
    num_bytes: int
    sha256: str | None  # None: no manifest states it yet

    @property
    def token(self) -> str:
        return token_of(self.path)


def token_of(path: str) -> str:
    """The name of the file in `wanted` by which a reader asks for a path."""
    folder, name = os.path.split(path)
    return hashlib.sha256(os.fsencode(f"{os.path.basename(folder)}/{name}")).hexdigest()[:32]


@lru_cache(maxsize=4096)
def origin_of(folder: str) -> str | None:
    """The URL of the remote folder that a local one stands for; None for any other."""
    try:
        with open(os.path.join(folder, ORIGIN), "rb") as file:
            url = json.loads(file.read(1 << 16)).get("wds_convnext cache of")
    except (OSError, ValueError, AttributeError):
        return None
    return url if isinstance(url, str) else None


def is_cached(path: str | os.PathLike) -> bool:
    """Whether a path is that of a remote object, here now or not."""
    return origin_of(os.path.dirname(path)) is not None


def where(path: str) -> str:
    """A path as people know it: the URL of a remote object, or what a link in a cache names."""
    folder, name = os.path.split(path)
    origin = origin_of(folder)
    if origin is None:
        return path
    return os.readlink(path) if os.path.islink(path) else join(origin, name)


class _Waiting:
    """What is called while this process waits for an object; it may raise."""

    check: Callable[[], None] = staticmethod(lambda: None)


@contextlib.contextmanager
def checking_while_waiting(check: Callable[[], None]) -> Iterator[None]:
    """Within this context `check` is called several times a second while an object is awaited.

    Not in child processes.
    """
    before, _Waiting.check = _Waiting.check, staticmethod(check)
    try:
        yield
    finally:
        _Waiting.check = staticmethod(before)


class _Found:
    """Reads of this process that found their bytes at once and are not noted yet."""

    number = 0


def _note_read(cache: str, seconds: float) -> None:
    """Count a read, which has waited for so many seconds."""
    _Found.number += not seconds
    if not seconds and _Found.number < _NOTE_EVERY:
        return
    with contextlib.suppress(OSError, struct.error):  # a figure is not worth a run
        file = os.open(os.path.join(cache, "reads"), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # readers are many
            found, waited, waited_s = READS.unpack(os.pread(file, READS.size, 0))
            found, waited = found + _Found.number, waited + bool(seconds)
            os.pwrite(file, READS.pack(found, waited, waited_s + seconds), 0)
            _Found.number = 0
        finally:
            os.close(file)


def open_locked(path: str) -> int:
    """A descriptor of a remote object's file, which is waited for; while it is open it stays here.

    Raises:
        ShardError: if the fetcher cannot get it; the message says why.
    """
    return _await([path], path)


def early_path(path: str, start: int) -> str:
    """Where a sample at a remote object's byte `start` stands, before the object is here."""
    cache = os.path.dirname(os.path.dirname(path))
    return os.path.join(cache, "first", f"{token_of(path)}-{start}")


def read_early(path: str, start: int, num_bytes: int) -> bytes | None:
    """The bytes of one sample of an object that is not here yet; None when all of it is.

    Not compared with anything but their number.

    Raises as `open_locked` does.
    """
    early = early_path(path, start)
    if os.path.exists(path) or not os.path.isdir(os.path.dirname(early)):
        return None
    file = _await([path, early], path)
    try:
        if os.fstat(file).st_size != num_bytes:
            return None
        return os.pread(file, num_bytes, 0)
    finally:
        os.close(file)


def _await(paths: list[str], path: str) -> int:
    """A locked descriptor of the first of these files that is there, of the object at `path`."""
    cache = os.path.dirname(os.path.dirname(path))
    wanted = os.path.join(cache, "wanted", token_of(path))
    parent = parent_process()
    started = 0.0  # when it began to wait
    while True:
        for found in paths:
            with contextlib.suppress(FileNotFoundError):
                file = os.open(found, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(file, fcntl.LOCK_SH)
                _note_read(cache, time.monotonic() - started if started else 0.0)
                return file
        started = started or time.monotonic()
        with contextlib.suppress(OSError), open(os.path.join(cache, "failed")) as file_:
            raise ShardError(file_.read())
        try:
            os.close(os.open(wanted, os.O_WRONLY | os.O_CREAT, 0o600))
        except OSError as error:
            raise ShardError(
                f"{where(path)}: its cache {cache} cannot be used ({error.strerror}). Look at the "
                "disk that holds it."
            ) from None
        if parent is None:  # a forked worker has inherited what is its parent's to check
            _Waiting.check()
        elif not parent.is_alive():  # nobody is left to fetch it
            raise ShardError(f"{where(path)}: the process that opened its cache is gone.")
        time.sleep(_POLL_S)


@contextlib.contextmanager
def held(path: str) -> Iterator[None]:
    """Within this context a shard is here and stays here; any local file is so anyway.

    Raises as `open_locked` does.
    """
    if not is_cached(path):
        yield
        return
    file = open_locked(path)
    try:
        yield
    finally:
        os.close(file)


def rounded(num_bytes: int) -> int:
    """What a file of so many bytes may occupy."""
    return (-(-num_bytes // _BLOCK) + 1) * _BLOCK


def occupied(path: str) -> int:
    """The bytes that a file takes on the disk; 0 if it is gone."""
    try:
        return os.lstat(path).st_blocks * 512  # what a link names is not in the cache
    except OSError:
        return 0
