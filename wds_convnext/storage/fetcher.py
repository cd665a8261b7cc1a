"""The fetcher: the process of a node that brings shards. Run as a program, see `programs`.

It keeps a cache: every few milliseconds it looks at the clock and at what readers wait for, and
begins what should begin. What it decides depends on nothing but the files in the cache's folder
(`layout`), so it may be killed and started again at any moment.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from wds_convnext.errors import ShardError, UsageError
from wds_convnext.files import unwritable, write_atomically
from wds_convnext.storage.early import Early
from wds_convnext.storage.layout import (
    COUNTS,
    GAVE_UP,
    MARGIN,
    Object,
    occupied,
    origin_of,
    rounded,
)
from wds_convnext.storage.needs import Needs
from wds_convnext.storage.transfer import Counts, Expected, Store

NUM_TRANSFERS = 8  # objects on their way at a time
_TICK_S = 0.02
_GRACE_S = 0.5  # in which an object that was waited for is not evicted
_RETRY_S = 0.2  # what was being read when it should have gone is tried again


class Fetcher:
    """The keeper of a cache's folder.

    Args:
        path: of the folder.
        cache_bytes: what it may occupy.
        timeout_s: see `Store`.
    """

    def __init__(self, path: Path, *, cache_bytes: int, timeout_s: float):
        self.path, self.cache_bytes, self.timeout_s = path, cache_bytes, timeout_s
        self._before = COUNTS.unpack((path / "counts").read_bytes())  # of fetchers that died
        self._num_published = self._num_evicted = 0
        self._stamps: dict[str, tuple] = {}
        self._objects: list[Object] = []
        self._by_token: dict[str, int] = {}
        self._needs = Needs(path)
        self._other_bytes = 0
        self._present: dict[int, int] = {}  # object -> bytes that it occupies
        self._strangers: dict[str, int] = {}  # path of a shard that nobody asks for -> bytes
        self._since: dict[int, float] = {}  # object -> when a reader last waited for it
        self._busy: dict[Future, tuple[int, int]] = {}  # -> object, bytes set aside
        self._counts: list[Counts] = []  # of each store, since one thread adds to it
        self._stores: list[Store] = []
        self._looked: tuple = ()
        self._pool = ThreadPoolExecutor(NUM_TRANSFERS)
        self._early = Early(path, self._lend)

    def run(self, owner: int) -> int:
        """Serve until the process that opened the cache ends; gives the exit code."""
        try:
            self._tick()
            # Numpy takes 0.1 s: neither what is read first nor the plan, which comes a moment
            # later, is to wait for it.
            import wds_convnext.storage.schedule  # noqa: F401

            while os.getppid() == owner:
                self._tick()
                if self._busy:
                    wait(self._busy, timeout=_TICK_S, return_when=FIRST_COMPLETED)
                else:
                    time.sleep(_TICK_S)
        except (ShardError, UsageError) as error:
            reason = str(error)
        except OSError as error:
            reason = (
                f"{unwritable(error.filename or self.path, error)} The cache of remote shards is "
                "there: use a smaller --cache-size, or another --cache-dir."
            )
        else:
            return 0
        write_atomically(self.path / "failed", reason.encode())
        return GAVE_UP

    def _tick(self) -> None:
        if self._has_changed("objects.json"):
            self._load_objects()
        if self._has_changed("plan.npy"):
            self._needs.load(len(self._objects))
            self._measure()
        for future in [future for future in self._busy if future.done()]:
            number, _ = self._busy.pop(future)
            future.result()
            self._present[number] = occupied(self._objects[number].path)
            self._num_published += 1
        wanted = self._wanted()
        for number in wanted & self._present.keys():
            self._since[number] = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                (self.path / "wanted" / self._objects[number].token).unlink()
        self._needs.update(len(self._objects))
        # Written before the plan, which says when its ranges are needed.
        if self._needs.are_known and self._has_changed("first.npy"):
            self._early.load(self._objects, self._present)
            self._shrink()
        reserved = self._early.reserved_bytes
        if self._early.tick(self._needs.now, self._present):  # first, since a batch waits for them
            self._write_counts()
            return
        if reserved and not self._early.reserved_bytes:
            self._measure()
            self._needs.is_settled = not self._needs.are_known  # with the room that came back
        busy = {number for number, _ in self._busy.values()}
        missing = [n for n in wanted if n not in busy and n not in self._present]
        for number in missing:
            self._begin(number, before=-1)
        if self._needs.are_known and not missing:
            # Looking costs 0.1 ms per 1,000 objects: only when something may be begun.
            looked = (
                self._needs.now,
                self._num_published,
                len(self._busy),
                time.monotonic() // _RETRY_S,
            )
            if looked != self._looked:
                self._looked = looked
                self._fetch_ahead(busy)
        self._write_counts()

    def _fetch_ahead(self, busy: set[int]) -> None:
        """Begin what is needed next, as long as what would go for it is needed later.

        What stays (`Needs.staying`) does not go for it.
        """
        times = self._needs.times
        for number in self._needs.order:
            if len(self._busy) >= NUM_TRANSFERS or times[number] == sys.maxsize:
                return
            if number in busy or number in self._present:
                continue
            if not self._begin(number, before=times[number]):
                return

    def _begin(self, number: int, *, before: int) -> bool:
        """Begin to fetch an object, if what may go for it makes room (see `Needs.to_go`)."""
        if len(self._busy) >= NUM_TRANSFERS:
            return False
        found = self._objects[number]
        needed = rounded(found.num_bytes)
        if not self._needs.is_settled and self._room() < needed:
            sizes = [rounded(found.num_bytes) for found in self._objects]
            held = self._other_bytes + self._early.reserved_bytes
            self._needs.settle(sizes, self.cache_bytes - held)
        now = time.monotonic()
        rested = (n for n in self._present if now - self._since.get(n, -_GRACE_S) >= _GRACE_S)
        waited_for_longest_ago = sorted(rested, key=lambda n: self._since.get(n, 0.0))
        going = self._needs.to_go(waited_for_longest_ago, before=before)
        if not self._make_room(needed, going):
            return False
        self._busy[self._pool.submit(self._fetch, found)] = number, needed
        return True

    def _make_room(self, num_bytes: int, going: list[int]) -> bool:
        """Delete strangers, then objects in this order, until so many bytes are free.

        None of them, if all together would not do.
        """
        room = self._room()
        most = room + sum(self._strangers.values()) + sum(self._present[n] for n in going)
        if most < num_bytes:
            return False
        while room < num_bytes and self._strangers:
            path, size = self._strangers.popitem()
            Path(path).unlink(missing_ok=True)
            room += size
        for victim in going:
            if room >= num_bytes:
                break
            room += self._evict(victim)
        return room >= num_bytes

    def _room(self) -> int:
        """Bytes that nothing occupies, or is about to."""
        taken = [*self._present.values(), *self._strangers.values()]
        taken += [size for _, size in self._busy.values()]
        return self.cache_bytes - self._other_bytes - self._early.reserved_bytes - sum(taken)

    def _fetch(self, found: Object) -> None:
        """Bring an object, and give it its name when it is what the manifest says."""
        part = f"{found.path}.part"
        try:
            with self._lend() as store:
                if found.sha256 is None:
                    store.fetch_unchecked(found.url, part, num_bytes=found.num_bytes)
                else:
                    store.fetch(found.url, part, Expected(found.num_bytes, found.sha256))
            os.rename(part, found.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    @contextlib.contextmanager
    def _lend(self) -> Iterator[Store]:
        """A store for one thread; clients keep what they have learned."""
        try:
            store = self._stores.pop()
        except IndexError:
            self._counts.append(Counts())
            store = Store.of(self.timeout_s, self._counts[-1])
        try:
            yield store
        finally:
            self._stores.append(store)

    def _evict(self, number: int) -> int:
        """Delete an object that nobody reads; gives the bytes that are free now."""
        path = self._objects[number].path
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            except BlockingIOError:
                return 0
            finally:
                os.close(file)
        self._num_evicted += 1
        self._since.pop(number, None)
        return self._present.pop(number)

    def _load_objects(self) -> None:
        """Take over the list of objects, which grows as splits are opened.

        Other shards in the cache's folders stay for as long as there is room: they may be those of
        a split that is opened next.
        """
        content = json.loads((self.path / "objects.json").read_bytes())
        is_first = not self._objects
        self._objects = [Object(*fields) for fields in content]
        self._by_token = {found.token: n for n, found in enumerate(self._objects)}
        number_at = {found.path: n for n, found in enumerate(self._objects)}
        self._strangers = {}
        busy = {f"{self._objects[n].path}.part" for n, _ in self._busy.values()}
        for folder in (entry.path for entry in os.scandir(self.path) if entry.is_dir()):
            if origin_of(folder) is None:
                continue
            for path in (entry.path for entry in os.scandir(folder)):
                number = number_at.get(path)
                if number is not None:
                    self._present.setdefault(number, occupied(path))
                elif path.endswith(".tar"):
                    self._strangers[path] = occupied(path)
                elif path.endswith(".part") and path not in busy:
                    os.unlink(path)  # of a fetcher that died
        self._measure()
        self._stamps.pop("plan.npy", None)  # it is laid over these objects
        if is_first:
            self._needs.update(len(self._objects))
            self._shrink()

    def _measure(self) -> None:
        """Count what is no shard: manifests, indexes, the plan, and what comes and goes."""
        tops = ((top, names) for top, _, names in os.walk(self.path) if Path(top).name != "first")
        paths = (os.path.join(top, name) for top, names in tops for name in ["", *names])
        rest = (path for path in paths if not path.endswith((".tar", ".part")))
        self._other_bytes = MARGIN + sum(map(occupied, rest))

    def _shrink(self) -> None:
        """Evict what is too much: an earlier run with a larger cache left it, or ranges come."""
        going = sorted(self._present, key=lambda number: -self._needs.times[number])
        self._make_room(0, going)

    def _wanted(self) -> set[int]:
        with contextlib.suppress(FileNotFoundError):
            tokens = os.listdir(self.path / "wanted")
            return {self._by_token[token] for token in tokens if token in self._by_token}
        return set()

    def _has_changed(self, name: str) -> bool:
        try:
            facts = os.stat(self.path / name)
        except FileNotFoundError:
            return False
        stamp = facts.st_ino, facts.st_mtime_ns
        has_changed = self._stamps.get(name) != stamp
        self._stamps[name] = stamp
        return has_changed

    def _write_counts(self) -> None:
        sums = [
            sum(counts.num_bytes for counts in self._counts),
            sum(counts.num_requests for counts in self._counts),
            sum(counts.num_retries for counts in self._counts),
            self._num_published,
            self._num_evicted,
        ]
        with open(self.path / "counts", "r+b", buffering=0) as file:
            file.write(COUNTS.pack(*(now + then for now, then in zip(sums, self._before))))


def main() -> None:
    """Serve, as the arguments PATH OWNER BYTES SECONDS say."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # it ends with its owner, which may have to save
    path, owner, cache_bytes, timeout_s = sys.argv[1:]
    serving = os.open(Path(path) / "serving", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(serving, fcntl.LOCK_EX)  # until this process is gone, whatever ends it
    fetcher = Fetcher(Path(path), cache_bytes=int(cache_bytes), timeout_s=float(timeout_s))
    code = fetcher.run(int(owner))
    os._exit(code)  # transfers under way are not waited for


if __name__ == "__main__":
    main()
