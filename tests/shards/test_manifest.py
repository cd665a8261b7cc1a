"""Manifests: read back as written, of the shape that wids reads, or refused in one line."""

import json

import pytest
from conftest import write_shards
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.errors import ShardError
from wds_convnext.shards.dataset import Dataset, read_manifest
from wds_convnext.shards.spec import Shard

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
file_names = st.integers(0, 999).map(lambda i: f"train-{i:03d}.tar")
optional_ints = st.none() | st.integers(0, 2**50)


@given(
    dataset=texts,
    split=texts,
    shards=st.lists(st.tuples(file_names, st.integers(0, 10**6), optional_ints, st.none() | texts)),
    class_names=st.lists(texts),
    source=st.lists(texts),
    options=st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts),
)
def test_a_manifest_reads_back_as_written(
    tmp_path_factory, dataset, split, shards, class_names, source, options
):
    """Every field, with any text in it; shards joined to the manifest's folder."""
    path = tmp_path_factory.getbasetemp() / "train.json"
    manifest = Dataset(
        dataset,
        split,
        tuple(Shard(str(path.parent / name), *facts) for name, *facts in shards),
        tuple(class_names),
        source=tuple(source),
        options=options,
    )

    manifest.write_manifest(path)

    found = read_manifest(path)
    for name in ("name", "split", "shards", "class_names", "source", "options"):
        assert getattr(found, name) == getattr(manifest, name)


def test_a_manifest_has_the_shape_that_wids_reads(tmp_path):
    """wids asserts version 1 and reads `url` and `nsamples` of each shard."""
    path = tmp_path / "train.json"
    Dataset(
        "mini", "train", (Shard("elsewhere/train-000.tar", 7, 10240, "ab"),), ("x",)
    ).write_manifest(path)

    content = json.loads(path.read_text())

    assert content["wids_version"] == 1
    assert content["shardlist"] == [
        {"url": "train-000.tar", "nsamples": 7, "filesize": 10240, "sha256": "ab"}
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff\xfe",
        b'{"class_names": [], "shardlist": [{"url": "a.tar"}]}',
        b'{"class_names": [], "shardlist": [{"url": "a.tar", "nsamples": null}]}',
        b'{"class_names": [], "shardlist": ["a.tar"]}',
        b'{"shardlist": []}',
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path, content):
    """Its path, what is wrong, and what to do."""
    path = tmp_path / "train.json"
    path.write_bytes(content)

    with pytest.raises(ShardError) as error:
        read_manifest(path)

    assert str(error.value).startswith(f"{path}: not a manifest of shards (")
    assert str(error.value).endswith("Write it again.")
    assert "\n" not in str(error.value)


def test_a_manifest_of_a_newer_version_is_refused(tmp_path):
    """What a newer version means by its fields is not known here."""
    manifest = write_shards(tmp_path, [1])
    manifest.write_text(manifest.read_text().replace("wds_convnext 1", "wds_convnext 2"))

    with pytest.raises(ShardError, match="format 'wds_convnext 2', expected 'wds_convnext 1'"):
        read_manifest(manifest)


def test_the_digest_tells_shard_sets_apart():
    """Another name, size, checksum or order of shards is another set; another folder is not."""
    one, two = Shard("a/t-0.tar", 5, 100, "x"), Shard("a/t-1.tar", 5, 100, "y")
    moved = Shard("b/t-0.tar", 5, 100, "x"), Shard("b/t-1.tar", 5, 100, "y")
    others = [
        (two, one),
        (one,),
        (one, Shard("a/t-1.tar", 6, 100, "y")),
        (one, Shard("a/t-1.tar", 5, 101, "y")),
        (one, Shard("a/t-1.tar", 5, 100, "z")),
        (one, Shard("a/t-2.tar", 5, 100, "y")),
    ]

    digests = [Dataset("d", "t", shards, ()).digest for shards in [(one, two), moved, *others]]

    assert digests[0] == digests[1]
    assert len(set(digests[1:])) == len(others) + 1
