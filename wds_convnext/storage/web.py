"""http(s) and hf:// by the standard library: status, Retry-After and stalls show as they are."""

import http.client
import re
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from time import time
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from wds_convnext.errors import ShardError, UsageError
from wds_convnext.storage.failures import (
    Transient,
    Unranged,
    by_status,
    package,
    reason_of,
)
from wds_convnext.urls import name_in

_PIECE = 1 << 20  # bytes handed on at a time
_MAX_REDIRECTS = 5


class HttpClient:
    """Plain GETs, one connection each."""

    def __init__(self, stall_s: float):
        self._stall_s = stall_s

    def read(self, url: str, start: int, stop: int | None = None) -> Iterator[bytes]:
        target, headers = self._target(url)
        with self._answering(target, headers, start, stop) as response:
            if response.status == 416 and start:
                return  # the object ends before `start`
            self._check(response, start, stop)
            while piece := response.read1(_PIECE):
                yield piece
            if response.length:
                raise Transient("cut short")

    def names(self, folder: str) -> list[str] | None:
        return None

    def size(self, url: str) -> int:
        target, headers = self._target(url)
        with self._answering(target, headers, 0, 1) as response:
            is_ranged = response.status in (206, 416)  # 416 of an empty object: "bytes */0"
            if not is_ranged:
                self._check(response, 0, None)
            stated = response.headers.get("Content-Range" if is_ranged else "Content-Length", "")
        if not (size := stated.rpartition("/")[2]).isdecimal():
            raise ShardError(f"{url}: the server does not say how large it is. Index a local copy.")
        return int(size)

    def is_sealed(self, url: str) -> bool:
        return self._target(url)[0].startswith("https:")

    def _target(self, url: str) -> tuple[str, dict[str, str]]:
        """The URL by which a web server knows an object, and headers of the request."""
        return url, {}

    @contextmanager
    def _answering(
        self, url: str, headers: dict[str, str], start: int, stop: int | None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET, after redirects; whatever goes wrong with it is transient."""
        connection: http.client.HTTPConnection | None = None
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                connection, response = self._ask(url, headers, start, stop)
                if response.status not in (301, 302, 303, 307, 308):
                    break
                target = urljoin(url, response.headers.get("Location", ""))
                if urlsplit(target).scheme not in ("https", urlsplit(url).scheme):
                    raise Transient("a redirect to no http URL, or out of https")
                if urlsplit(target).netloc != urlsplit(url).netloc:
                    headers = {}  # credentials are for the first host alone
                url = target
                connection.close()
            yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Transient(reason_of(error)) from None
        finally:
            if connection:
                connection.close()

    def _ask(
        self, url: str, headers: dict[str, str], start: int, stop: int | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
            parts.query and f"?{parts.query}"
        )
        proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
        via = urlsplit(proxy if proxy and "://" in proxy else f"//{proxy or parts.netloc}")
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                via.hostname or "", via.port, timeout=self._stall_s, context=_tls()
            )
            if proxy:
                connection.set_tunnel(host, port, headers=_proxy_login(via))
        else:
            connection = http.client.HTTPConnection(
                via.hostname or "", via.port, timeout=self._stall_s
            )
            if proxy:
                path = f"http://{parts.netloc}{path}"
                headers = {**headers, **_proxy_login(via)}
        last = "" if stop is None else stop - 1
        ranged = {"Range": f"bytes={start}-{last}"} if start or stop else {}
        # identity: a store that compresses would make sizes and ranges those of something else
        connection.request(
            "GET", path, headers={"Accept-Encoding": "identity", **ranged, **headers}
        )
        return connection, connection.getresponse()

    def _check(self, response: http.client.HTTPResponse, start: int, stop: int | None) -> None:
        status = response.status
        if status not in (200, 206):
            raise by_status(status, retry_after(response.headers.get("Retry-After")))
        if stop is not None and status == 200:
            raise Unranged
        if start and status == 206:
            begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if begins is None or int(begins[1]) != start:
                raise Transient("another range than asked for")
        elif start:  # a server without ranges sends all of it
            left = start
            while left:
                piece = response.read1(min(left, _PIECE))
                if not piece:
                    raise Transient("cut short")
                left -= len(piece)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"}


def retry_after(header: str | None) -> float:
    """The seconds that a Retry-After header asks for: a number of them, or a date; else 0."""
    if not header:
        return 0.0
    try:
        if header.strip().isdigit():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (ValueError, OverflowError, TypeError):
        return 0.0


class HubClient(HttpClient):
    """`hf://datasets/owner/name[@revision]/path` and `hf://buckets/owner/name/path`, by GETs."""

    _SHAPE = re.compile(
        r"hf://(?P<kind>datasets|buckets)/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>.+)"
    )

    def __init__(self, stall_s: float):
        super().__init__(stall_s)
        self._hub = package("huggingface_hub")

    def _target(self, url: str) -> tuple[str, dict[str, str]]:
        kind, repo, revision, path = self._parts(url)
        if kind == "datasets":
            target = self._hub.hf_hub_url(repo, path, repo_type="dataset", revision=revision)
        else:
            endpoint = self._hub.HfApi().endpoint
            target = f"{endpoint}/buckets/{repo}/resolve/{quote(path)}"
        return target, {k: v for k, v in self._hub.utils.build_hf_headers().items() if v}

    def names(self, folder: str) -> list[str] | None:
        kind, repo, revision, path = self._parts(folder + "/x")
        path = path.rpartition("/")[0]
        api = self._hub.HfApi()
        try:
            if kind == "datasets":
                tree = api.list_repo_tree(
                    repo, path or None, repo_type="dataset", revision=revision
                )
            else:
                tree = api.list_bucket_tree(repo, path or None)
            return [name_in(entry.path) for entry in tree if hasattr(entry, "size")]
        except Exception as error:  # of the Hub's client, whose kinds differ between versions
            raise by_status(
                getattr(getattr(error, "response", None), "status_code", None)
            ) from None

    def _parts(self, url: str) -> tuple[str, str, str | None, str]:
        match = self._SHAPE.fullmatch(url)
        if match is None:
            raise UsageError(
                f"{url}: not a place on the Hub. Write hf://datasets/OWNER/NAME/train.json or "
                "hf://buckets/OWNER/NAME/train.json."
            )
        revision = match["revision"] and unquote(match["revision"])
        return match["kind"], match["repo"], revision, match["path"]
