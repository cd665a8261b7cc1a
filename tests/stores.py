"""A store on loopback that fails as real ones do: some share of the GETs, in one of seven ways."""

import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import write_parquet

from wds_convnext.conversion import convert

FAULTS = ("408", "429", "503", "stall", "cut", "length", "flip")


def write_store(folder: Path, *, train: int, validation: int) -> Path:
    """Shards of two samples with manifests and indexes, as a store holds them; gives their folder.

    Args:
        train, validation: samples of each split.
    """
    write_parquet(folder / "parquet", "train", [train])
    write_parquet(folder / "parquet", "validation", [validation])
    source, out = folder / "parquet", folder / "data"
    convert(str(source), out=str(out), samples_per_shard=2, jobs=1, quiet=True)
    return out


class HostileStore(ThreadingHTTPServer):
    """Serves a folder with ranges.

    Args:
        failing: probability that a GET fails.
        faults: the ways in which it may.
        stall_s: how long a stalled answer takes.
        ranged: whether it has ranges.
        latency_s, bytes_per_s: before each answer; of all of them together.
        retry_after: what 429 and 503 ask for.
    """

    daemon_threads = True
    request_queue_size = 128  # of 5, most of 64 connections at once would be tried again after 1 s

    def __init__(
        self,
        folder,
        *,
        failing=0.0,
        faults=FAULTS,
        stall_s=1.0,
        retry_after="0",
        seed=0,
        ranged=True,
        latency_s=0.0,
        bytes_per_s=math.inf,
    ):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.failing, self.faults = Path(folder), failing, faults
        self.stall_s, self.retry_after = stall_s, retry_after
        self.ranged, self.latency_s, self.bytes_per_s = ranged, latency_s, bytes_per_s
        self.line_free = 0.0  # when the line has sent all that was to be sent
        self.rng, self.lock = random.Random(seed), threading.Lock()
        self.asked: Counter[str] = Counter()  # names of objects
        self.asked_whole: Counter[str] = Counter()  # those not asked for by a range with an end
        self.failed: Counter[str] = Counter()  # faults
        self.sent = 0  # bytes of bodies
        self.num_ranges = self.sent_ranges = 0  # that were asked for, with an end; their bytes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self) -> str | None:
        with self.lock:
            if self.rng.random() >= self.failing:
                return None
            fault = self.rng.choice(self.faults)
            self.failed[fault] += 1
            return fault

    def wait_for_line(self, num_bytes: int) -> None:
        """Take as long as the line takes for so many bytes, after those of others."""
        with self.lock:
            now = time.monotonic()
            self.line_free = max(self.line_free, now) + num_bytes / self.bytes_per_s
            pause = self.line_free - now
        time.sleep(pause)

    def draw(self, stop: int) -> int:
        with self.lock:
            return self.rng.randrange(stop)

    def handle_error(self, request, client_address):
        pass  # clients that are killed hang up


class _Answer(BaseHTTPRequestHandler):
    server: HostileStore

    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.asked[name.rpartition("/")[2]] += 1
        path = self.server.folder / name
        if not path.is_file():
            return self._say(404)
        size, start, stop = path.stat().st_size, 0, None
        time.sleep(self.server.latency_s)
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not (ranged and ranged[2]):
            self.server.asked_whole[name.rpartition("/")[2]] += 1
        if ranged and self.server.ranged:
            start = int(ranged[1])
            if start >= size:
                return self._say(416)
            stop = int(ranged[2]) + 1 if ranged[2] else None
            self.server.num_ranges += bool(ranged[2])
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(None if stop is None else stop - start)
        fault = self.server.fault()
        if fault in ("408", "429", "503"):
            return self._say(int(fault), {"Retry-After": self.server.retry_after})
        length = len(data)
        if fault == "flip":
            at = self.server.draw(length)
            data = data[:at] + bytes([data[at] ^ 1 << self.server.draw(8)]) + data[at + 1 :]
        if fault == "length":
            length = self.server.draw(length)  # a proxy that counts wrong
        if fault in ("cut", "stall"):
            data = data[: self.server.draw(length)]
        headers = {"Content-Length": length}
        if ranged and self.server.ranged:
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
        self._head(206 if ranged and self.server.ranged else 200, headers)
        for at in range(0, length, 1 << 18):
            piece = data[at : min(length, at + (1 << 18))]
            self.server.wait_for_line(len(piece))
            self.wfile.write(piece)
        self.server.sent += len(data[:length])
        if ranged and ranged[2]:
            self.server.sent_ranges += len(data[:length])
        if fault == "stall":
            self.wfile.flush()
            time.sleep(self.server.stall_s)
        self.close_connection = True
        return None

    def do_HEAD(self):
        path = self.server.folder / self.path.lstrip("/")
        time.sleep(self.server.latency_s)
        if not path.is_file():
            return self._say(404)
        return self._head(200, {"Content-Length": path.stat().st_size})

    def _say(self, status, headers=None):
        self._head(status, {"Content-Length": 0} | (headers or {}))

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder, **options) -> Iterator[HostileStore]:
    """A store that serves a folder meanwhile."""
    store = HostileStore(folder, **options)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        thread.join()
        store.server_close()
