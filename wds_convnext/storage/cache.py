"""The cache of a process: its folder, and the fetcher that fills it.

A process has at most one, which begins when the first URL is opened within `caching`. No client
of a store is ever imported here, see `programs`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import ShardError, UsageError
from wds_convnext.files import free_bytes, replacing, unwritable, write_atomically
from wds_convnext.progress import warn
from wds_convnext.storage.claim import claim
from wds_convnext.storage.layout import COUNTS, MARGIN, ORIGIN, READS, Object, occupied, origin_of
from wds_convnext.storage.programs import Supervisor, ask
from wds_convnext.storage.schedule import Plan
from wds_convnext.urls import join

# How splits are called, where a store has no listings.
_USUAL_STEMS = ("train", "training", "validation", "val", "valid", "dev", "eval", "test")
_MAX_MANIFEST = 1 << 28  # bytes, as for local ones


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
        path, self._lock = claim(root)
        held = sum(occupied(str(f)) for f in path.rglob("*"))
        most, size = free_bytes(path) + held, self._settings.cache_size
        if size is not None and size > most:
            warn(
                f"--cache-size {size / 1e9:.3g} GB: {most / 1e9:.3g} GB are free in {path}, so "
                "the cache takes no more than that."
            )
        self.num_bytes = most * 3 // 4 if size is None else min(size, most)
        return path

    def folder(self, url: str, *, stem: str | None = None) -> str:
        """The local folder that stands for a remote one, with the manifests that are there.

        Args:
            stem: of a manifest that should be among them.
        Raises:
            ShardError: if the store cannot be read.
        """
        return self._known(url, lambda: self._bring_folder(url, stem))

    def link(self, manifest: str, url: str) -> str:
        """The local folder that stands for a remote one whose manifest and index are local files.

        Args:
            manifest: its absolute path; the index stands next to it.
            url: of the folder that holds the shards.
        """
        return self._known(manifest, lambda: self._link(manifest, url))

    def _known(self, key: str, make: Callable[[], str]) -> str:
        """The folder that this process, or the first of the node, has for a URL or manifest."""
        if key in self._folders:
            return self._folders[key]
        if self._shared is not None:
            known = json.loads((self.path / "folders.json").read_bytes())
            if key not in known:
                raise ShardError(f"{key}: the first process of this node has not opened it.")
        else:
            known = {**self._folders, key: make()}
            write_atomically(self.path / "folders.json", json.dumps(known).encode())
        self._folders[key] = known[key]
        return known[key]

    def _bring_folder(self, url: str, stem: str | None) -> str:
        """Fetch a folder's manifests. They name its local folder: others would be other shards."""
        incoming = self._incoming()
        stems = dict.fromkeys([*([stem] if stem else []), *_USUAL_STEMS])
        found = self._ask(url, to=str(incoming), max_bytes=_MAX_MANIFEST, stems=list(stems))
        names = [f"{stem}.json" for stem in sorted(found["stems"])]
        return self._publish(incoming, url, names)

    def _link(self, manifest: str, url: str) -> str:
        incoming, name = self._incoming(), os.path.basename(manifest)
        (incoming / name).symlink_to(manifest)
        index = manifest.removesuffix(".json") + ".index"
        (incoming / os.path.basename(index)).symlink_to(index)
        return self._publish(incoming, url, [name])

    def _incoming(self) -> Path:
        incoming = self.path / f"incoming-{os.urandom(4).hex()}"
        incoming.mkdir()
        return incoming

    def _publish(self, incoming: Path, url: str, names: list[str]) -> str:
        """Name a folder after its URL and manifests; whole shards of these that are left serve."""
        digest = hashlib.sha256(url.encode())
        for name in names:
            digest.update(b"\0" + name.encode() + b"\0" + (incoming / name).read_bytes())
        folder = self.path / digest.hexdigest()[:16]
        write_atomically(incoming / ORIGIN, json.dumps({"wds_convnext cache of": url}).encode())
        if origin_of(str(folder)) is None:
            shutil.rmtree(folder, ignore_errors=True)
            incoming.rename(folder)
            origin_of.cache_clear()
            return str(folder)
        present = os.listdir(incoming)
        for path in incoming.iterdir():
            path.replace(folder / path.name)  # links may name other places
        for path in folder.iterdir():
            if path.is_symlink() and path.name not in present:  # of a local manifest, once
                path.unlink()
        incoming.rmdir()
        return str(folder)

    def place(self, url: str, names: list[str], globs: list[str]) -> list[Object]:
        """Let objects of a folder be asked for of which no manifest states what they are.

        Args:
            names: of the objects.
            globs: of shards that are looked for in the folder's listing.
        Raises:
            ShardError: if one is not there, or there are globs and the store has no listings.
        """
        sizes = self._ask(url, names=names, globs=globs)["sizes"]
        incoming = self._incoming()
        write_atomically(incoming / ORIGIN, json.dumps({"wds_convnext cache of": url}).encode())
        folder = incoming.rename(self.path / f"placed-{os.urandom(4).hex()}")
        self._folders[str(folder)] = str(folder)
        placed = [
            Object(join(url, name), str(folder / name), num_bytes, None)
            for name, num_bytes in sizes.items()
        ]
        self.add(placed)
        return placed

    def keep(self, paths: list[str], manifest: str, url: str) -> None:
        """Let objects that `place` gave, as far as they are here, serve who opens their manifest.

        Args:
            manifest, url: as for `link`.
        """
        folder = Path(self._link(manifest, url))
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, folder / os.path.basename(path))

    def bring(self, url: str, path: str, *, max_bytes: int) -> None:
        """Fetch a small file, unless it is there.

        Raises as `folder` does.
        """
        if self._shared is None and not os.path.exists(path):
            self._ask(url, to=f"{path}.tmp", max_bytes=max_bytes)
            os.rename(f"{path}.tmp", path)

    def _ask(self, url: str, **more: Any) -> dict:
        return ask({"url": url, "timeout_s": self._settings.remote_timeout, **more})

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

    def reads(self) -> tuple[int, int, float]:
        """Reads that found their bytes here, reads that waited for them, and their seconds.

        Of all processes of this node; the last few of each that waited for nothing are not in it.
        """
        with contextlib.suppress(OSError, struct.error):
            return READS.unpack((self.path / "reads").read_bytes())
        return 0, 0, 0.0

    def close(self) -> None:
        """End the fetcher, and leave the folder to others; what is in it may serve them."""
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Clock:
    """How far a rank is: a number of batches that were handed over to it, in a file."""

    def __init__(self, path: str, local_rank: int):
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._offset = 8 * local_rank

    def report(self, time: int) -> None:
        os.pwrite(self._file, struct.pack("<q", time), self._offset)

    def close(self) -> None:
        os.close(self._file)
