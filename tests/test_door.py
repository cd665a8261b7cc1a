"""What comes in through the door is bounded, typed, and text that can be written back."""

import json
import os

import pytest
from conftest import write_shards
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.check.index import read_class_names
from wds_convnext.door import base_name, check_shape, count, parse_json, read_bounded, text
from wds_convnext.errors import ShardError, UsageError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.opening import open_dataset

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
SHAPE = {"name": text, "sizes": [count], "shards?": [{"url": base_name}]}


@given(value=JSON | st.fixed_dictionaries({"name": JSON, "sizes": JSON | st.lists(JSON)}))
def test_what_passes_is_of_the_shape(value):
    """Every other value is a ValueError, never another."""
    try:
        check_shape(value, SHAPE)
    except ValueError:
        return
    assert isinstance(value["name"], str)
    assert all(type(size) is int and size >= 0 for size in value["sizes"])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100_000, "NaN", "1e999", '"\\ud800"', '{"\\udc80": 1}', "9" * 5000, b"\xff"],
)  # fmt: skip
def test_text_that_cannot_be_written_back_is_refused(content):
    """Deep nesting, numbers that are none, half of a surrogate pair, bytes that are not text."""
    with pytest.raises(ValueError):
        parse_json(content, {"name": text})


@pytest.mark.parametrize("kind", ["large", "sparse", "pipe", "folder"])
def test_what_is_no_small_file_is_not_read(tmp_path, kind):
    """At once, without waiting for a writer and without taking memory."""
    path = tmp_path / "train.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"x" * 101)
        os.truncate(path, 6 << 30 if kind == "sparse" else 101)

    with pytest.raises((ValueError, OSError)):
        read_bounded(path, max_bytes=100)
    with pytest.raises(ShardError, match="not a manifest of shards"):
        read_manifest(path)


FORGED = {
    "outside": {"url": "../train-000.tar"},
    "absolute": {"url": "/etc/passwd"},
    "upwards": {"url": ".."},
    "no text": {"url": 3},
    "negative": {"nsamples": -1},
    "negative size": {"filesize": -5},
    "a fraction": {"nsamples": 1.5},
    "true": {"nsamples": True},
    "huge": {"nsamples": 10**30},
    "digits": {"nsamples": "3"},
    "bytes as text": {"filesize": "10"},
    "sum as number": {"sha256": 12},
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_entry_of_a_manifest_is_refused(tmp_path, forged):
    """Names lead nowhere else, and counts count."""
    path = write_shards(tmp_path, [3, 2])
    content = json.loads(path.read_text())
    content["shardlist"][1] |= FORGED[forged]
    path.write_text(json.dumps(content))

    with pytest.raises(ShardError, match=r"train.json: not a manifest of shards \(.*expected"):
        open_dataset(str(path))


@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_a_forged_count_never_trains_on_fewer_samples(tmp_path, num_samples):
    """Whether the index is there already or made now."""
    path = write_shards(tmp_path, [3, 2])
    assert len(open_dataset(str(path))) == 5
    content = json.loads(path.read_text())
    content["shardlist"][1]["nsamples"] = num_samples
    path.write_text(json.dumps(content))

    with pytest.raises(ShardError, match=f"it has 2 samples, expected {num_samples}"):
        open_dataset(str(path))


def test_a_sidecar_of_gigabytes_is_not_read(tmp_path):
    """A sparse file beside a small tar: refused by its size."""
    manifest = write_shards(tmp_path, [3])
    with open(tmp_path / "train-000.idx", "r+b") as file:
        file.truncate(6 << 30)

    with pytest.raises(ShardError, match=r"train-000.idx: not a whole sidecar .*the limit is"):
        open_dataset(str(manifest))


@pytest.mark.parametrize("content", [b'["a", "\\ud800"]', b"[" * 9999, b"\xff", b'["a", NaN]'])
def test_class_names_that_cannot_be_written_are_refused(tmp_path, content):
    """Before a shard is read."""
    (tmp_path / "names.json").write_bytes(content)

    with pytest.raises(UsageError, match=r"--class-names .*names.json: not a readable text file"):
        read_class_names(str(tmp_path / "names.json"))
