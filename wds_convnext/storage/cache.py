"""The cache of a process: its folder, and the fetcher that fills it.

A process has at most one, which begins when the first URL is opened within `caching`. No client
of a store is ever imported here, see `programs`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import ShardError, UsageError
from wds_convnext.files import free_bytes, replacing, unwritable, write_atomically
from wds_convnext.progress import warn
from wds_convnext.storage.layout import COUNTS, MARGIN, ORIGIN, Object, occupied, origin_of
from wds_convnext.storage.programs import Supervisor, ask
from wds_convnext.storage.schedule import Plan

# How splits are called, where a store has no listings.
_USUAL_STEMS = ("train", "training", "validation", "val", "valid", "dev", "eval", "test")
_MAX_MANIFEST = 1 << 28  # bytes, as for local ones
_MAX_CACHES = 64  # in one --cache-dir at a time


class _Current:
    cache: "Cache | None" = None


@contextlib.contextmanager
def caching(settings: RemoteConfig, *, shared: Path | None = None) -> Iterator["Cache"]:
    """Within this context remote shards go through a cache with these settings.

    A cache that is in use already stays in place.

    Args:
        shared: the folder of a cache that another process of this node has opened, to use it too.
    """
    before = _Current.cache
    if before is not None and before.is_used:
        yield before
        return
    _Current.cache = cache = Cache(settings, shared=shared)
    try:
        yield cache
    finally:
        _Current.cache = before
        cache.close()


def current_cache() -> "Cache":
    """This process's cache; outside `caching` one with default settings, until the process ends."""
    if _Current.cache is None:
        _Current.cache = Cache(RemoteConfig())
    return _Current.cache


class Cache:
    """The cache of this process, see `caching`. Nothing is written before it is first used."""

    def __init__(self, settings: RemoteConfig, *, shared: Path | None = None):
        self._settings, self._shared = settings, shared
        self._path: Path | None = shared
        self._lock: int | None = None
        self._objects: list[Object] = []
        self._numbers: dict[str, int] = {}
        self._folders: dict[str, str] = {}
        self._fetcher: Supervisor | None = None
        self.num_bytes = 0  # that it may occupy, once it is open

    @property
    def is_used(self) -> bool:
        """Whether a URL was opened."""
        return bool(self._folders)

    @property
    def path(self) -> Path:
        """Its folder, which is this process's own, or that of the process that shares it.

        Raises:
            UsageError: if it cannot be written.
        """
        if self._path is None:
            base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            root = Path(self._settings.cache_dir or os.path.join(base, "wds_convnext", "remote"))
            try:
                self._path = self._claim(root.absolute())
            except OSError as error:
                raise UsageError(
                    f"--cache-dir {unwritable(error.filename or root, error)}"
                ) from None
        return self._path

    def _claim(self, root: Path) -> Path:
        """A folder under `root` that no other process uses: the first that is free."""
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
            self._lock = lock
            _await_end_of_fetcher(path)
            self._clear(path)
            held = sum(occupied(str(f)) for f in path.rglob("*"))
            most, size = free_bytes(path) + held, self._settings.cache_size
            if size is not None and size > most:
                warn(
                    f"--cache-size {size / 1e9:.3g} GB: {most / 1e9:.3g} GB are free in {path}, so "
                    "the cache takes no more than that."
                )
            self.num_bytes = most * 3 // 4 if size is None else min(size, most)
            return path
        raise UsageError(
            f"--cache-dir {root}: {_MAX_CACHES} other processes have their caches there. Choose "
            "another."
        )

    def _clear(self, path: Path) -> None:
        """Take away what an earlier process has left, but for the shards."""
        for name in (
            "objects.json",
            "plan.npy",
            "first.npy",
            "clock",
            "failed",
            "folders.json",
        ):
            (path / name).unlink(missing_ok=True)
        for wanted in (path / "wanted").iterdir():
            wanted.unlink()
        for rest in (f for name in ("*.tmp", "incoming-*", "first") for f in path.glob(name)):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        (path / "counts").write_bytes(COUNTS.pack(0, 0, 0, 0, 0))

    def folder(self, url: str, *, stem: str | None = None) -> str:
        """The local folder that stands for a remote one, with the manifests that are there.

        Args:
            stem: of a manifest that should be among them.
        Raises:
            ShardError: if the store cannot be read.
        """
        if url in self._folders:
            return self._folders[url]
        if self._shared is not None:
            known = json.loads((self.path / "folders.json").read_bytes())
            if url not in known:
                raise ShardError(f"{url}: the first process of this node has not opened it.")
        else:
            known = {**self._folders, url: self._bring_folder(url, stem)}
            write_atomically(self.path / "folders.json", json.dumps(known).encode())
        self._folders[url] = known[url]
        return known[url]

    def _bring_folder(self, url: str, stem: str | None) -> str:
        """Fetch a folder's manifests. They name its local folder: others would be other shards."""
        incoming = self.path / f"incoming-{os.urandom(4).hex()}"
        incoming.mkdir()
        stems = dict.fromkeys([*([stem] if stem else []), *_USUAL_STEMS])
        found = self._ask(url, str(incoming), _MAX_MANIFEST, stems=list(stems))["stems"]
        digest = hashlib.sha256(url.encode())
        for name in sorted(found):
            digest.update(b"\0" + name.encode() + b"\0" + (incoming / f"{name}.json").read_bytes())
        folder = self.path / digest.hexdigest()[:16]
        write_atomically(incoming / ORIGIN, json.dumps({"wds_convnext cache of": url}).encode())
        if origin_of(str(folder)) is not None:
            shutil.rmtree(incoming)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            incoming.rename(folder)
            origin_of.cache_clear()
        return str(folder)

    def bring(self, url: str, path: str, *, max_bytes: int) -> None:
        """Fetch a small file, unless it is there.

        Raises as `folder` does.
        """
        if self._shared is None and not os.path.exists(path):
            self._ask(url, f"{path}.tmp", max_bytes)
            os.rename(f"{path}.tmp", path)

    def _ask(self, url: str, to: str, max_bytes: int, **more: Any) -> dict:
        request = {
            "url": url,
            "to": to,
            "max_bytes": max_bytes,
            "timeout_s": self._settings.remote_timeout,
            **more,
        }
        return ask(request)

    @property
    def room(self) -> int:
        """Bytes that are left for shards, besides manifests, indexes and the plan."""
        rest = (f for f in self.path.rglob("*") if f.suffix not in (".tar", ".part"))
        return self.num_bytes - MARGIN - sum(occupied(str(f)) for f in rest)

    def add(self, objects: Sequence[Object]) -> None:
        """Let these objects be asked for, and start the fetcher.

        Raises:
            UsageError: if one alone is larger than the cache.
        """
        new = [found for found in objects if found.path not in self._numbers]
        for found in new:
            self._numbers[found.path] = len(self._objects)
            self._objects.append(found)
        if not new or self._shared is not None:
            return
        largest = max(found.num_bytes for found in new)
        path = self.path
        if largest > self.num_bytes:
            raise UsageError(
                f"--cache-size {self.num_bytes / 1e9:.3g} GB in {path}: the largest shard has "
                f"{largest / 1e9:.3g} GB. Free some space, use another --cache-dir, or a larger "
                "--cache-size."
            )
        write_atomically(path / "objects.json", json.dumps(self._objects).encode())
        if self._fetcher is None:
            self._fetcher = Supervisor(path, self.num_bytes, self._settings.remote_timeout)

    def follow(
        self,
        plan: Plan,
        paths: Sequence[str],
        *,
        start: int,
        num_ranks: int,
        first: np.ndarray | None = None,
    ) -> None:
        """Fetch ahead after a plan from now on.

        Args:
            paths: of the objects that the plan numbers.
            first: what the first batches read before these objects are here: times from which it
                may be fetched, objects, offsets, bytes; int64 (4, num_ranges), by time. When the
                time of the last one has come, none of them is needed.
            start: the time at which every rank is.
            num_ranks: on this node, that will `report`.
        """
        if self._shared is not None:
            return
        numbers = np.array([self._numbers.get(path, -1) for path in paths], np.int64)
        plan = Plan.of(numbers[plan.object], plan.first, plan.last)
        (self.path / "clock").write_bytes(struct.pack(f"<{num_ranks}q", *[start] * num_ranks))
        if first is not None and first.size:
            (self.path / "first").mkdir(exist_ok=True)
            first[1] = numbers[first[1]]
            with replacing(self.path / "first.npy") as file:
                np.save(file, first)
        with replacing(self.path / "plan.npy") as file:
            np.save(file, np.stack([plan.object, plan.first, plan.last]))

    def clock(self, local_rank: int) -> "Clock":
        """How a rank of this node reports how far it is."""
        return Clock(str(self.path / "clock"), local_rank)

    def counts(self) -> tuple[int, ...]:
        """Bytes, requests, retries, objects fetched, objects evicted, by now."""
        with contextlib.suppress(OSError, struct.error):
            return COUNTS.unpack((self.path / "counts").read_bytes())
        return (0,) * 5

    def close(self) -> None:
        """End the fetcher, and leave the folder to others; what is in it may serve them."""
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _await_end_of_fetcher(path: Path) -> None:
    """Wait for the fetcher of a process that was killed: it sees that within a moment."""
    serving = os.open(path / "serving", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(serving, fcntl.LOCK_EX)
    finally:
        os.close(serving)


class Clock:
    """How far a rank is: a number of batches that were handed over to it, in a file."""

    def __init__(self, path: str, local_rank: int):
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._offset = 8 * local_rank

    def report(self, time: int) -> None:
        os.pwrite(self._file, struct.pack("<q", time), self._offset)

    def close(self) -> None:
        os.close(self._file)
