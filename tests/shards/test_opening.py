"""Opening shards: with a manifest or without, and what does not fit in one line."""

import os
from pathlib import Path

import pytest
from conftest import CLASS_NAMES, sample_members, write_shards, write_tar
from test_reader import pairs, read_all

from wds_convnext.errors import DataError, ShardError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.expand import find_counterpart
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader


def test_shards_with_a_manifest_are_opened_as_it_says(tmp_path):
    """Sizes, class names and data set; no shard is read for it, only its size compared."""
    manifest = write_shards(tmp_path, [3, 0, 2])

    dataset = open_dataset(f"{tmp_path}/train-<000..002>.tar")

    assert dataset.shards == read_manifest(manifest).shards
    assert dataset.sizes.tolist() == [3, 0, 2]
    assert (dataset.name, dataset.split) == ("pictures", "train")
    assert dataset.class_names == tuple(CLASS_NAMES)
    assert dataset.digest == open_dataset(str(manifest)).digest


@pytest.mark.parametrize("spec", ["//train-<000..001>.tar", "/./train-{000..001}.tar", "/train-*"])
def test_a_manifest_is_found_however_the_path_is_spelt(tmp_path, spec):
    """`"$DATA/train-<000..001>.tar"` has two slashes where DATA ends in one."""
    write_shards(tmp_path, [3, 2])

    dataset = open_dataset(f"{tmp_path}{spec}")

    assert dataset.sizes.tolist() == [3, 2]
    assert dataset.class_names == tuple(CLASS_NAMES)


def test_shards_without_a_manifest_are_surveyed(tmp_path):
    """Samples are counted, classes are the labels up to the highest."""
    for i, size in enumerate([3, 2]):
        write_tar(tmp_path / f"{i:05d}.tar", sample_members(size, start=5 * i))

    dataset = open_dataset(str(tmp_path))

    assert dataset.sizes.tolist() == [3, 2]
    assert dataset.class_names == ("0", "1", "2")
    paths = [shard.path for shard in dataset.shards]
    assert [shard.num_bytes for shard in dataset.shards] == list(map(os.path.getsize, paths))
    assert read_all(SampleReader(dataset)) == pairs(sample_members(3) + sample_members(2, start=5))


def corrupt(folder: Path) -> None:
    os.truncate(folder / "train-001.tar", 5000)


def stage(folder: Path) -> None:
    (folder / "train.json").unlink()
    (folder / "train.partial").mkdir()


def empty(folder: Path) -> None:
    write_shards(folder, [0, 0])


def rename_classes(folder: Path) -> None:
    manifest = folder / "val.json"
    manifest.write_text(manifest.read_text().replace("ant", "Ameise"))


def add_shard(folder: Path) -> None:
    write_tar(folder / "train-002.tar", sample_members(1, start=20))


def label_below_zero(folder: Path) -> None:
    (folder / "train.json").unlink()
    (folder / "train-001.idx").unlink()
    write_tar(folder / "train-001.tar", [("a.jpg", b""), ("a.cls", b"-1")])


@pytest.mark.parametrize(
    ("damage", "spec", "message"),
    [
        (corrupt, "train.json", "train-001.tar: 5,000 bytes, but its manifest says 10,240."),
        (stage, "train-*.tar", "train.partial: the conversion was interrupted"),
        (empty, "train.json", "train.json: the shards hold no samples."),
        (rename_classes, "*.tar", "train.json and {}/val.json: their class names differ: class 0"),
        (add_shard, "train-*.tar", "train-002.tar: not listed in {}/train.json."),
        (label_below_zero, "train-*.tar", "train-001.tar, key a: label -1 is outside the"),
    ],
)
def test_shards_that_do_not_fit_end_in_one_line(tmp_path, damage, spec, message):
    """A shard cut or unknown, a conversion interrupted, no samples, other or negative classes."""
    write_shards(tmp_path, [3, 2])
    write_shards(tmp_path, [2], split="val")
    damage(tmp_path)

    with pytest.raises((ShardError, DataError)) as error:
        open_dataset(f"{tmp_path}/{spec}")

    assert message.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], None),
        (["test-000.tar"], None),
        (["val-000.tar"], "val-*.tar"),
        (["val-000.tar", "val.json"], "val.json"),
        (["val.json", "validation-000.tar"], "validation-*.tar"),
    ],
)
def test_validation_shards_are_found_by_name(tmp_path, files, expected):
    """Beside the training shards: `validation` before `val`, a manifest before its shards."""
    write_shards(tmp_path, [1])
    for name in files:
        (tmp_path / name).touch()

    found = find_counterpart(f"{tmp_path}/train-000.tar", use="validation")

    assert found == (expected and f"{tmp_path}/{expected}")
