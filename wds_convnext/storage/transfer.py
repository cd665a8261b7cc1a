"""One object from a store to a file, however the store behaves: whole and checked, or an error."""

import errno
import hashlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from wds_convnext.errors import AbsentError, ShardError
from wds_convnext.progress import warn
from wds_convnext.storage.clients import Client, client_for
from wds_convnext.storage.failures import Denied, Missing, Transient
from wds_convnext.urls import scheme_of

Result = TypeVar("Result")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 20.0
_LONGEST_STALL_S = 15.0  # without a byte: the request is cut and made again
_LEAST_RATE = 1024  # bytes a second; a store that only drips stalls
# Random damage differs each time. What comes so often alike is what the object now holds.
_NUM_ALIKE = 4
_MAX_WRONG = 20  # of one object, whatever came instead
_QUIET_S = 5.0  # a store that is silent for longer is worth a line


@dataclass(frozen=True)
class Expected:
    """What an object has to be; None where nothing is known."""

    num_bytes: int | None = None
    sha256: str | None = None
    max_bytes: int = 1 << 62


@dataclass
class Counts:
    """What one store was asked for."""

    num_bytes: int = 0
    num_requests: int = 0
    num_retries: int = 0


class Clients:
    """One client per scheme, made when it is first needed; of one thread."""

    def __init__(self, *, stall_s: float):
        self.stall_s = stall_s
        self._clients: dict[str, Client] = {}

    def of(self, url: str, *, fresh: bool = False) -> Client:
        scheme = scheme_of(url) or ""
        if fresh or scheme not in self._clients:
            self._clients[scheme] = client_for(url, stall_s=self.stall_s)
        return self._clients[scheme]


@dataclass(frozen=True)
class Store:
    """What asks stores, again and again where that may help.

    Args:
        timeout_s: how long an object may make no progress before that is an error.
        counts: is added to.
    """

    clients: Clients
    timeout_s: float
    counts: Counts

    @classmethod
    def of(cls, timeout_s: float, counts: Counts) -> "Store":
        stall_s = min(_LONGEST_STALL_S, timeout_s / 4)
        return cls(Clients(stall_s=stall_s), timeout_s, counts)

    def names(self, folder: str) -> list[str] | None:
        """The names of the objects in a folder, as `Client.names`.

        Raises:
            ShardError: if it is not there, may not be read, or does not answer in time.
        """
        return self._again(folder, lambda: self.clients.of(folder).names(folder))

    def fetch(self, url: str, path: str, expected: Expected, *, start: int | None = None) -> None:
        """Write an object to a file, from scratch; of a range that begins at `start`, no more.

        Raises:
            Unranged: if a range is asked for, and the store has none.
            ShardError: if it is not there, may not be read, does not come in time, or is not what
                is expected, as often as it is fetched.
            OSError: if the file cannot be written.
        """
        with open(path, "wb") as file:
            transfer = _Transfer(self, url, file.fileno(), expected, start)
            self._again(url, transfer.attempt, progress=lambda: transfer.brought)
            if start is None:  # ranges do not outlive their run
                os.fsync(file.fileno())

    def fetch_unchecked(
        self, url: str, path: str, *, max_bytes: int = 1 << 62, num_bytes: int | None = None
    ) -> None:
        """Write an object of unknown content, when two fetches in a row are alike.

        Args:
            num_bytes: that it has, if that is known. Then one fetch is enough where bytes cannot
                change on their way.

        Raises as `fetch` does.
        """
        before = None
        started = time.monotonic()
        while True:
            self.fetch(url, path, Expected(num_bytes, max_bytes=max_bytes))
            if num_bytes is not None and self.clients.of(url).is_sealed(url):
                return
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest == before:
                return
            if time.monotonic() - started > self.timeout_s and before is not None:
                raise ShardError(f"{url}: it is another each time. Wait until it is written.")
            before = digest

    def size(self, url: str) -> int:
        """The bytes of an object.

        Raises as `names` does.
        """
        return self._again(url, lambda: self.clients.of(url).size(url))

    def _again(
        self, url: str, ask: Callable[[], Result], *, progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """What `ask` gives, asked again after failures that may pass."""
        wait, num_denied, most = _FIRST_WAIT_S, 0, 0
        since, has_warned = time.monotonic(), False
        while True:
            try:
                self.counts.num_requests += 1
                return ask()
            except Missing:
                raise AbsentError(
                    f"{url}: the store has no such object (404). Look at the name, or upload it."
                ) from None
            except Denied as denied:
                num_denied += 1
                if num_denied > 1:  # once with fresh credentials
                    raise ShardError(
                        f"{url}: the store refuses to give it ({denied}). Look at the credentials "
                        "in the environment (see docs/remote.md)."
                    ) from None
                self.clients.of(url, fresh=True)
            except Transient as failure:
                self.counts.num_retries += 1
                now = time.monotonic()
                if progress() > most:
                    most, since, wait, num_denied = progress(), now, _FIRST_WAIT_S, 0
                    has_warned = False
                if now - since > self.timeout_s:
                    raise ShardError(
                        f"{url}: no progress for {self.timeout_s:,.0f} s ({failure}). Look at the "
                        "network and the store, then go on (train: --resume), or use a longer "
                        "--remote-timeout."
                    ) from None
                if now - since > _QUIET_S and not has_warned:
                    has_warned = True
                    warn(
                        f"{url}: no answer for {now - since:.0f} s ({failure}); it is asked again "
                        f"for up to {self.timeout_s:,.0f} s (--remote-timeout)."
                    )
                if isinstance(failure, _Wrong):  # it answers, so there is no reason to hold back
                    wait = _FIRST_WAIT_S
                # Jitter, so that many nodes do not come back at the same moment.
                pause = max(failure.retry_after, random.uniform(wait / 2, wait))
                time.sleep(min(pause, max(0.0, self.timeout_s - (now - since)) + 0.01))
                wait = min(2 * wait, _LONGEST_WAIT_S)


class _Wrong(Transient):
    """The store answered, but not what was expected."""


class _Transfer:
    """An object on its way to a file: each attempt goes on where the one before was cut."""

    def __init__(
        self, store: Store, url: str, file: int, expected: Expected, start: int | None = None
    ):
        self._store, self._url, self._file, self._expected = store, url, file, expected
        self._start = start or 0
        self._stop = None if start is None else start + (expected.num_bytes or 0)
        self._wrong: list[str] = []  # what came instead, each time
        self.brought = 0  # bytes in all, those that were thrown away as well
        self._begin()

    def _begin(self) -> None:
        self.done = 0
        self._digest = hashlib.sha256()
        os.ftruncate(self._file, 0)

    def attempt(self) -> None:
        expected, size = self._expected, self._expected.num_bytes
        started, brought, before = time.monotonic(), 0, self.brought
        client = self._store.clients.of(self._url)
        for piece in client.read(self._url, self._start + self.done, self._stop):
            limit = expected.max_bytes if size is None else size
            if self.done + len(piece) > limit:
                if size is None:
                    raise ShardError(
                        f"{self._url}: more than {limit:,} bytes. It is not what it should be."
                    )
                self._refuse(f"more than {size:,} bytes")
            _write(self._file, piece, self.done)
            self._digest.update(piece)
            self.done += len(piece)
            self._store.counts.num_bytes += len(piece)
            self.brought += len(piece)
            brought += len(piece)
            if (seconds := time.monotonic() - started) > self._store.clients.stall_s:
                if brought < _LEAST_RATE * seconds:
                    raise Transient(f"{brought:,} bytes in {seconds:.0f} s")
                started, brought = time.monotonic(), 0
        if size is not None and self.done < size:
            # The end of a shorter object, or of a request that was cut without a word: the next
            # attempt goes on here, and finds nothing if the object ends here.
            if self.brought == before:
                self._refuse(f"{self.done:,} bytes")
            raise _Wrong("cut short")
        found = self._digest.hexdigest()
        if expected.sha256 not in (None, found):
            self._refuse(f"SHA-256 {found[:16]}…")

    def _refuse(self, found: str) -> None:
        """Throw away what came, and begin again; unless it is the same each time."""
        self._wrong.append(found)
        self._begin()
        last = self._wrong[-_NUM_ALIKE:]
        if len(self._wrong) >= _MAX_WRONG or last == _NUM_ALIKE * last[:1]:
            wanted = self._expected
            if wanted.sha256 is None:
                raise ShardError(
                    f"{self._url}: it has {found}, but had {wanted.num_bytes:,} bytes a moment "
                    "ago. Wait until it is written, then run the same command again."
                )
            raise ShardError(
                f"{self._url}: it has {found}, but its manifest says {wanted.num_bytes:,} bytes, "
                f"SHA-256 {str(wanted.sha256)[:16]}…: the object is another than the manifest's. "
                "Upload it and its manifest again, then continue."
            )
        raise _Wrong(f"wrong bytes: {found}")


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, offset)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, offset = view[written:], offset + written
