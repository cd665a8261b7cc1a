"""How bytes of a store are asked for. Only the programs `fetcher` and `asking` do so.

http(s) and hf:// are `web`'s; s3, gs and az go through obstore (extra `remote`), whose own retries
are switched off; every other scheme through fsspec. What fails is one of `failures`.
"""

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

from wds_convnext.errors import UsageError
from wds_convnext.storage.failures import (
    Denied,
    Missing,
    Transient,
    by_status,
    package,
    reason_of,
)
from wds_convnext.storage.profiles import aws_profile
from wds_convnext.storage.web import HttpClient, HubClient
from wds_convnext.urls import name_in, parent, scheme_of

_PART = 1 << 23  # bytes of one request, where a client does not stream
# Where a machine in a cloud learns its credentials, after all else was looked through.
_METADATA_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
# What names another server than the usual one, by scheme.
_AWS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_AZURE = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_OBSTORE = {"s3": _AWS, "r2": _AWS, "gs": ("GOOGLE_BASE_URL",)}
_AZURE_SCHEMES, _AZURE_EMULATOR = ("az", "azure", "abfss"), "AZURE_STORAGE_USE_EMULATOR"
_OBSTORE |= dict.fromkeys(_AZURE_SCHEMES, _AZURE)


class Client(Protocol):
    """What a store is asked: bytes of an object, and names in a folder."""

    def read(self, url: str, start: int, stop: int | None = None) -> Iterator[bytes]:
        """An object's bytes from `start` on, up to `stop`, in pieces.

        Raises:
            Missing, Denied, Transient: which may come at any piece.
            Unranged: if there is a `stop`, and the store gives whole objects only.
        """

    def names(self, folder: str) -> list[str] | None:
        """The names of the objects in a folder; None where the store has no listings."""

    def size(self, url: str) -> int:
        """The bytes of an object.

        Raises:
            Missing, Denied, Transient: as its client has them.
        """

    def is_sealed(self, url: str) -> bool:
        """Whether the connection checks all bytes on their way, as TLS does."""


def client_for(url: str, *, stall_s: float) -> Client:
    """A client for a URL's store.

    Args:
        stall_s: seconds without a byte after which a request is given up.
    Raises:
        UsageError: if it needs a package that is not installed, or the scheme is not known.
    """
    scheme = scheme_of(url)
    if scheme in ("http", "https"):
        return HttpClient(stall_s)
    if scheme == "hf":
        return HubClient(stall_s)
    if scheme in _OBSTORE:
        return ObstoreClient(scheme, stall_s)
    return FsspecClient(url)


class ObstoreClient:
    """s3, gs and az, with the usual chain of credentials; without any, as a stranger."""

    def __init__(self, scheme: str, stall_s: float):
        self._scheme, self._stall_s = scheme, stall_s
        self._obstore = package("obstore")
        package("obstore.store")  # not imported with it
        self._stores: dict[str, Any] = {}
        self._options: dict[str, Any] = aws_profile() if scheme in ("s3", "r2") else {}

    def read(self, url: str, start: int, stop: int | None = None) -> Iterator[bytes]:
        size = stop
        while size is None or start < size:
            store = self._store(parent(url))
            try:
                end = start + _PART if stop is None else min(stop, start + _PART)
                found = self._obstore.get(store, name_in(url), options={"range": (start, end)})
                whole, begin = int(found.meta["size"]), int(found.range[0])
                if begin != start:
                    raise Transient("another range than asked for")
                size = whole if stop is None else stop
                expected = min(end, whole) - start
                data = bytes(found.bytes())
            except Transient:
                raise
            except Exception as error:
                if "status code: 416" in str(error) and start:
                    return  # the object ends before `start`
                raise self._translated(error) from None
            if len(data) != expected:
                raise Transient("cut short")
            start += len(data)
            yield data

    def names(self, folder: str) -> list[str] | None:
        try:
            found = self._obstore.list_with_delimiter(self._store(folder))
        except Exception as error:
            raise self._translated(error) from None
        return [name_in(entry["path"]) for entry in found["objects"]]

    def size(self, url: str) -> int:
        try:
            return int(self._obstore.head(self._store(parent(url)), name_in(url))["size"])
        except Exception as error:
            raise self._translated(error) from None

    def is_sealed(self, url: str) -> bool:
        is_emulated = self._scheme in _AZURE_SCHEMES and os.environ.get(_AZURE_EMULATOR)
        return not (self._endpoint.startswith("http:") or is_emulated)

    @property
    def _endpoint(self) -> str:
        """The server that is named; empty for the usual one."""
        stated = self._options.get("aws_endpoint")
        return next(filter(None, [*map(os.environ.get, _OBSTORE[self._scheme]), stated]), "")

    def _store(self, folder: str) -> Any:
        if folder not in self._stores:
            store_url = re.sub(r"^r2://", "s3://", folder)
            self._stores[folder] = self._obstore.store.from_url(
                store_url,
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=self._stall_s)},
                client_options={
                    "connect_timeout": f"{self._stall_s * 1000:.0f}ms",
                    "timeout": f"{4 * self._stall_s * 1000:.0f}ms",  # of a part
                    "allow_http": self._endpoint.startswith("http:"),
                },
                **self._options,
            )
        return self._stores[folder]

    @property
    def _is_stranger(self) -> bool:
        return "skip_signature" in self._options

    def _translated(self, error: Exception) -> Exception:
        self._stores.clear()  # made again, a store finds newer credentials
        known = self._obstore.exceptions
        if isinstance(error, FileNotFoundError | known.NotFoundError):
            return Missing()
        if isinstance(error, known.PermissionDeniedError | known.UnauthenticatedError):
            return Denied("no credentials found" if self._is_stranger else "no permission")
        if any(host in str(error) for host in _METADATA_HOSTS) and not self._is_stranger:
            # The end of the chain was asked in vain, so there are none: public buckets need none.
            self._options["skip_signature"] = True
            return Transient("no credentials found")
        status = re.search(r"status code: (\d+)", str(error))
        if status:
            return by_status(int(status[1]))
        return Transient("no connection" if "HTTP error" in str(error) else type(error).__name__)


class FsspecClient:
    """Every other scheme, as far as fsspec and its plug-ins know it."""

    def __init__(self, url: str):
        fsspec = package("fsspec")
        try:
            self._system, _ = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(
                f"{url}: fsspec does not know this store ({reason_of(error)}). Use s3, gs, az, hf "
                "or https, or install fsspec's plug-in for it."
            ) from None

    def read(self, url: str, start: int, stop: int | None = None) -> Iterator[bytes]:
        size = self.size(url) if stop is None else stop
        try:
            while start < size:
                piece = self._system.cat_file(url, start=start, end=min(size, start + _PART))
                if not piece:
                    raise Transient("cut short")
                start += len(piece)
                yield piece
        except Exception as error:
            raise _translated(error) from None

    def names(self, folder: str) -> list[str] | None:
        try:
            return [name_in(path) for path in self._system.ls(folder, detail=False)]
        except Exception as error:
            raise _translated(error) from None

    def size(self, url: str) -> int:
        try:
            return int(self._system.info(url)["size"])
        except Exception as error:
            raise _translated(error) from None

    def is_sealed(self, url: str) -> bool:
        return False  # not known


def _translated(error: Exception) -> Exception:
    """A failure of an fsspec plug-in, whose kinds are not known here."""
    if isinstance(error, FileNotFoundError):
        return Missing()
    if isinstance(error, PermissionError):
        return Denied("no permission")
    return error if isinstance(error, Transient) else Transient(reason_of(error))
