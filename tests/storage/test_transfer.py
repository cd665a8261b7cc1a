"""Objects arrive whole and checked, or there is one line that says why not."""

import hashlib
import os
import time

import pytest
from stores import FAULTS, serving

from wds_convnext.errors import ShardError, UsageError
from wds_convnext.storage.clients import client_for
from wds_convnext.storage.transfer import Counts, Expected, Store
from wds_convnext.storage.web import HttpClient, retry_after
from wds_convnext.urls import check_url, redacted

DATA = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a.tar").write_bytes(DATA)
    return tmp_path / "store"


def expected(data=DATA):
    return Expected(len(data), hashlib.sha256(data).hexdigest())


def fetch(store, path, wanted, *, timeout_s=6.0, name="a.tar"):
    counts = Counts()
    Store.of(timeout_s, counts).fetch(f"{store.url}/{name}", str(path), wanted)
    return counts


@pytest.mark.parametrize("fault", FAULTS)
def test_every_way_to_fail_is_survived(folder, tmp_path, fault):
    """Half of the GETs fail in this way; what arrives is right, and the retries are counted."""
    with serving(folder, failing=0.5, faults=[fault], stall_s=2, seed=1) as store:
        for number in range(3):
            counts = fetch(store, tmp_path / str(number), expected(), timeout_s=2)
            assert (tmp_path / str(number)).read_bytes() == DATA
            assert counts.num_requests >= 1 and counts.num_bytes >= len(DATA)

        assert store.failed[fault] > 0
        assert store.asked["a.tar"] > 3


def test_what_was_cut_goes_on_where_it_was_cut(folder, tmp_path):
    with serving(folder, failing=0.7, faults=["cut"], seed=4) as store:
        fetch(store, tmp_path / "a", expected())

        assert store.failed["cut"] > 1
        assert store.sent == len(DATA)


def test_retry_after_is_honored(folder, tmp_path):
    with serving(folder, failing=0.6, faults=["503"], retry_after="1", seed=4) as store:
        started = time.monotonic()
        fetch(store, tmp_path / "a", expected())

        assert store.failed["503"] >= 1
        assert time.monotonic() - started >= store.failed["503"]


@pytest.mark.parametrize(
    "header, seconds",
    [(None, 0), ("120", 120), ("soon", 0), ("-3", 0), ("Sun, 06 Nov 1994 08:49:37 GMT", 0)],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert retry_after(header) == seconds


def test_a_missing_object_is_one_line_at_once(folder, tmp_path):
    with serving(folder) as store, pytest.raises(ShardError, match=r"b.tar: .* \(404\)"):
        fetch(store, tmp_path / "b", expected(), name="b.tar")
    assert store.asked["b.tar"] == 1


@pytest.mark.parametrize("found", [DATA[:-1], DATA + b"more", DATA[:-1] + b"x"])
def test_another_object_is_one_line(folder, tmp_path, found):
    """An object that differs from its manifest the same way each time was changed."""
    (folder / "a.tar").write_bytes(found)
    with serving(folder) as store, pytest.raises(ShardError, match="another than the manifest's"):
        fetch(store, tmp_path / "a", expected())
    assert store.asked["a.tar"] <= 9


def test_a_store_that_never_answers_is_one_line(folder, tmp_path):
    with serving(folder, failing=1.0, faults=["503"]) as store:
        started = time.monotonic()
        with pytest.raises(ShardError, match="no progress for 1 s .status 503"):
            fetch(store, tmp_path / "a", expected(), timeout_s=1)
    assert 1 <= time.monotonic() - started < 10


def test_nothing_is_taken_beyond_the_limit(folder, tmp_path):
    """An object of unknown size takes no more of the disk than it may."""
    with serving(folder) as store, pytest.raises(ShardError, match="more than 1,000 bytes"):
        fetch(store, tmp_path / "a", Expected(max_bytes=1000))


def test_unchecked_objects_come_twice_alike(folder, tmp_path):
    """A manifest has no checksum: a flipped bit shows as a difference between two fetches."""
    with serving(folder, failing=0.4, faults=["flip", "length"], seed=1) as store:
        url, path = f"{store.url}/a.tar", tmp_path / "a"
        Store.of(6.0, Counts()).fetch_unchecked(url, str(path), max_bytes=1 << 20)

        assert path.read_bytes() == DATA
        assert sum(store.failed.values()) > 0


@pytest.mark.parametrize(
    "url",
    [
        "https://ann:secret@host/data/train.json",
        "https://host/data/train.json?X-Amz-Signature=secret",
        "s3://AKIA:secret@bucket/train-<000..003>.tar",
        "https://host/train.json#token=secret",
    ],
)
def test_urls_with_secrets_are_refused_without_naming_them(url):
    with pytest.raises(UsageError) as refused:
        check_url(url)

    assert "secret" not in str(refused.value)
    assert "secret" not in redacted(url)


@pytest.mark.parametrize("url", ["s3://b/train-{000..012}.tar", "hf://datasets/a/b@v1.0/t?.tar"])
def test_patterns_and_revisions_are_no_secrets(url):
    assert check_url(url) == url


def test_an_unknown_store_is_one_line():
    with pytest.raises(UsageError, match="fsspec does not know this store"):
        client_for("gopher://host/data", stall_s=1)


@pytest.mark.parametrize(
    "url, endpoint, is_sealed",
    [
        ("https://host/a.tar", "", True),
        ("http://host/a.tar", "", False),
        ("hf://datasets/ann/pets/a.tar", "", True),
        ("s3://bucket/a.tar", "", True),
        ("s3://bucket/a.tar", "AWS_ENDPOINT_URL=http://127.0.0.1:9", False),
        ("s3://bucket/a.tar", "AWS_ENDPOINT_URL=https://minio.example", True),
        ("gs://bucket/a.tar", "AWS_ENDPOINT_URL=http://127.0.0.1:9", True),
        ("gs://bucket/a.tar", "GOOGLE_BASE_URL=http://127.0.0.1:9", False),
        ("az://container/a.tar", "AZURE_STORAGE_ENDPOINT=http://127.0.0.1:9", False),
        ("az://container/a.tar", "AZURE_STORAGE_USE_EMULATOR=true", False),
        ("memory://a.tar", "", False),
    ],
)
def test_only_encrypted_connections_are_sealed(monkeypatch, tmp_path, url, endpoint, is_sealed):
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    if endpoint:
        monkeypatch.setenv(*endpoint.split("="))

    assert client_for(url, stall_s=1).is_sealed(url) is is_sealed


def test_an_object_of_known_size_comes_twice_unless_it_is_sealed(folder, tmp_path, monkeypatch):
    """The same server, which the client takes for one behind TLS the second time."""
    times = []
    for is_sealed in (False, True):
        monkeypatch.setattr(HttpClient, "is_sealed", lambda *_, answer=is_sealed: answer)
        with serving(folder) as store:
            url, path = f"{store.url}/a.tar", tmp_path / "a"
            Store.of(6.0, Counts()).fetch_unchecked(url, str(path), num_bytes=len(DATA))
            times.append(store.asked["a.tar"])
        assert path.read_bytes() == DATA

    assert times == [2, 1]
