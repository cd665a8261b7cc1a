"""A stand-in for the Hub: a server of this machine that gives a folder's files out as it does."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(root: Path) -> Iterator[dict[str, str]]:
    """Serve `root/owner/name/file` as the file of a repository; gives the environment to use it."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            repository, _, rest = self.path.removeprefix("/").partition("/resolve/")
            path = root / repository / rest.partition("/")[2]
            content = path.read_bytes() if rest and path.is_file() else b""
            self.send_response(200 if content else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            if content:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            else:
                is_there = (root / repository).is_dir()
                self.send_header("X-Error-Code", "EntryNotFound" if is_there else "RepoNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_ENDPOINT": endpoint, "HF_HOME": str(root / "cache"), "HF_HUB_DISABLE_XET": "1"}
        server.shutdown()
