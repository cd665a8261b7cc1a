"""Shards that training would trip over are refused by name, and nothing is left behind."""

from pathlib import Path

import pytest
from conftest import encode_image, sample_members, write_shards, write_tar
from test_indexing import index

from wds_convnext.errors import DataError, ShardError, UsageError


def repeat_a_key(folder):
    write_tar(folder / "train-001.tar", sample_members(2, start=1))


def lose_a_label(folder):
    write_tar(folder / "train-001.tar", sample_members(2, start=9)[:-1])


def dot_in_the_key(folder):
    image = encode_image(0)
    write_tar(folder / "train-001.tar", [("img.001.jpg", image), ("img.001.cls", b"0")])


def label_with_a_word(folder):
    write_tar(folder / "train-001.tar", [("9.jpg", encode_image(0)), ("9.cls", b"dog")])


def label_below_zero(folder):
    write_tar(folder / "train-001.tar", [("9.jpg", encode_image(0)), ("9.cls", b"-1")])


def identifier_for_a_label(folder):
    write_tar(folder / "train-001.tar", [("9.jpg", encode_image(0)), ("9.cls", b"20000000000")])


def cut(folder):
    shard = write_tar(folder / "train-001.tar", sample_members(2, start=9))
    Path(shard).write_bytes(Path(shard).read_bytes()[:1536])


def stale_sidecar(folder):
    write_tar(folder / "train-001.tar", sample_members(2, start=9))
    (folder / "train-001.idx").write_text("v1.2 0\n")


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (repeat_a_key, ShardError, "train-001.tar: the key 0001 is also in {}/train-000.tar"),
        (lose_a_label, ShardError, "train-001.tar, key 0010: no .cls or .json label"),
        (dot_in_the_key, ShardError, "train-001.tar, key img: no image (found .001.jpg"),
        (label_with_a_word, DataError, "train-001.tar, key 9: the label b'dog' is not an integer"),
        (label_below_zero, DataError, "train-001.tar, key 9: label -1 is outside"),
        (identifier_for_a_label, DataError, "key 9: label 20000000000 is outside"),
        (cut, ShardError, "train-001.tar: cut short"),
        (stale_sidecar, ShardError, "train-001.idx: says otherwise than a walk of the tar"),
    ],
)
def test_shards_that_training_would_trip_over_are_refused_by_name(tmp_path, fault, error, said):
    """And no manifest is written, so nothing reads as complete."""
    write_shards(tmp_path, [3]).unlink()
    fault(tmp_path)

    with pytest.raises(error) as caught:
        index(tmp_path)

    assert said.format(tmp_path) in str(caught.value)
    assert not (tmp_path / "train.json").exists()


def test_shards_that_are_not_those_of_their_manifest_are_refused(tmp_path):
    """A manifest that lists more than is named, and one with another size."""
    manifest = write_shards(tmp_path, [3, 2])

    with pytest.raises((UsageError, ShardError), match="train-001.tar|lists other shards"):
        index(tmp_path / "train-000.tar")
    with open(tmp_path / "train-000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match="train-000.tar: num_bytes is"):
        index(tmp_path)
    assert not manifest.with_suffix(".index").exists()


def test_gaps_are_not_made_to_look_complete(tmp_path):
    """A range with a missing shard."""
    write_shards(tmp_path, [3, 2, 2]).unlink()
    (tmp_path / "train-001.tar").unlink()

    with pytest.raises(ShardError, match="train-001.tar: missing"):
        index(tmp_path / "train-<000..002>.tar")


@pytest.mark.parametrize("fault", [cut, label_with_a_word, repeat_a_key])
def test_a_failure_leaves_nothing_behind(tmp_path, fault):
    """No sidecar of another shard or split; what was there before stays."""
    write_shards(tmp_path, [3]).unlink()
    write_shards(tmp_path, [2], split="val").unlink()
    for path in tmp_path.glob("*-000.idx"):
        path.unlink()
    fault(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}

    with pytest.raises((ShardError, DataError)):
        index(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == before
