"""The index of a split: what it holds, when it is believed, and what its checksums find."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import encode_image, sample_members, write_shards, write_tar

from wds_convnext.conversion import convert
from wds_convnext.errors import DataError, ShardError
from wds_convnext.shards.index import RECORD, IndexFile, open_index
from wds_convnext.shards.indexing import cache_path
from wds_convnext.shards.opening import open_dataset


@pytest.fixture
def converted(parquet, tmp_path) -> Path:
    """Freshly converted shards: their index has checksums."""
    convert(str(parquet), out=str(tmp_path / "data"), jobs=1, shuffle=False, quiet=True)
    return tmp_path / "data"


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_data_set_is_a_sequence_of_samples(converted):
    """Key, image, label, by number from either end; labels without touching an image."""
    dataset = open_dataset(str(converted / "train.json"))

    samples = [dataset[number] for number in range(len(dataset))]

    assert len(dataset) == 50
    assert [sample.key for sample in samples] == [f"{row:09d}" for row in range(50)]
    assert samples[7].image == encode_image(sum(b"train") * 1000 + 7)
    assert dataset.labels.dtype == np.int32
    assert dataset.labels.tolist() == [sample.label for sample in samples]
    assert dataset[-1] == samples[-1]
    for number in (50, -51):
        with pytest.raises(IndexError):
            dataset[number]


def test_it_opens_without_its_shards_labels_and_all(converted):
    """After it was opened once nothing but the index is needed to know labels and places."""
    dataset = open_dataset(str(converted / "train.json"))
    for path in converted.glob("*.tar"):
        path.unlink()

    assert len(dataset.labels) == 50
    assert dataset.index.record(2, 3).image_bytes > 0


def test_a_part_of_the_shards_uses_the_split_s_index(converted):
    """Another order of the shards, too; nothing is made anew."""
    before = (converted / "train.index").stat()  # its time of access may change

    dataset = open_dataset(f"{converted}/train-002.tar,{converted}/train-000.tar")

    whole = open_dataset(str(converted / "train.json"))
    assert dataset.index.has_checksums
    assert dataset[0] == whole[22] and dataset[28] == whole[0]
    after = (converted / "train.index").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_old_folder_gets_an_index_of_the_same_places(converted, jobs):
    """From sidecars or by walking the tars: all but the checksums is as conversion wrote it."""
    expected = open_dataset(str(converted / "train.json"))
    records = [expected.index.records(shard).copy() for shard in range(3)]
    (converted / "train.index").unlink()
    (converted / "train-001.idx").unlink()

    dataset = open_dataset(str(converted / "train.json"), jobs=jobs)

    assert not dataset.index.has_checksums
    assert (converted / "train.index").exists()
    assert dataset.digest == expected.digest
    for shard in range(3):
        found = dataset.index.records(shard)
        for field in set(RECORD.names) - {"checksum", "flags"}:
            assert (found[field] == records[shard][field]).all(), field
    assert [dataset[i] for i in range(50)] == [expected[i] for i in range(50)]


def test_a_read_only_folder_gets_its_index_elsewhere(tmp_path, monkeypatch):
    """In the cache folder, and in memory where that cannot be written either."""
    manifest = write_shards(tmp_path / "data", [3, 2])
    monkeypatch.setattr(os, "access", lambda path, mode: str(tmp_path / "data") != str(path))

    dataset = open_dataset(str(manifest))

    assert not manifest.with_suffix(".index").exists()
    assert os.path.exists(cache_path(dataset.shards))
    os.unlink(cache_path(dataset.shards))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    in_memory = open_dataset(str(manifest))
    assert not os.path.exists(cache_path(dataset.shards))
    assert [in_memory[i] for i in range(5)] == [dataset[i] for i in range(5)]
    assert pickle.loads(pickle.dumps(in_memory))[4] == dataset[4]


def test_an_index_of_other_shards_is_made_again(tmp_path):
    """The file that was there is not believed: another size, another time, another checksum."""
    manifest = write_shards(tmp_path, [3, 2])
    open_dataset(str(manifest))

    write_tar(tmp_path / "train-000.tar", sample_members(3, start=10))
    (tmp_path / "train-000.idx").unlink()
    dataset = open_dataset(str(manifest))

    assert dataset[0] == ("0010", encode_image(10), 2)


@pytest.mark.parametrize("change", ["cut", "grow", "magic", "footer", "empty"])
def test_a_damaged_index_file_is_made_again(tmp_path, change):
    """Cut anywhere, grown, of another version, with a footer that is not JSON."""
    manifest = write_shards(tmp_path, [3, 2])
    expected = list(open_dataset(str(manifest)))
    path = manifest.with_suffix(".index")
    data = path.read_bytes()
    damaged = {
        "cut": data[:-50],
        "grow": data + b"x",
        "magic": b"W" + data[1:],
        "footer": data[:-20] + b"{" * 12 + data[-8:],
        "empty": b"",
    }
    path.write_bytes(damaged[change])

    assert open_index(str(path)) is None
    assert list(open_dataset(str(manifest))) == expected


def test_no_flipped_bit_of_an_image_is_a_picture(converted):
    """Every byte of one image, one at a time: an error that names the sample."""
    dataset = open_dataset(str(converted / "train.json"))
    (start, num_bytes), _ = dataset.index.record(0, 4).places
    shard = Path(dataset.shards[0].path)

    for at in range(start, start + num_bytes, 7):
        change_byte(shard, at)
        with pytest.raises(DataError, match="key 000000004: image or label are not those"):
            dataset[4]
        change_byte(shard, at)
    assert dataset[4].key == "000000004"


def test_a_swapped_label_is_found(converted):
    """In the tar, where it is another class."""
    dataset = open_dataset(str(converted / "train.json"))
    _, (at, _) = dataset.index.record(0, 4).places

    change_byte(Path(dataset.shards[0].path), at)

    with pytest.raises(DataError, match="key 000000004: label 1, but its index says 0"):
        dataset[4]


def test_no_flipped_bit_of_a_record_is_another_sample(converted):
    """Every bit of one record: the right sample, or an error of ours."""
    path = converted / "train.index"
    truth = open_dataset(str(converted / "train.json"))[5]
    places = IndexFile(str(path)).find(open_dataset(str(converted / "train.json")).shards[0])
    data = path.read_bytes()

    for at in range(RECORD.itemsize):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[places[1] + 5 * RECORD.itemsize + at] ^= 1 << bit
            path.write_bytes(damaged)
            dataset = open_dataset(str(converted / "train.json"))
            try:
                found = dataset[5]
            except (ShardError, DataError):
                continue
            assert found == truth


def test_the_index_is_shared_by_copies_and_processes(converted):
    """A pickle holds its path, not its records; reading goes on after a fork."""
    dataset = open_dataset(str(converted / "train.json"))
    dataset[0]

    copied = pickle.loads(pickle.dumps(dataset))
    child = os.fork()
    if child == 0:
        os._exit(0 if dataset[49] == copied[49] else 1)

    assert len(pickle.dumps(dataset)) < 3000
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("package", ["shards.opening", "conversion", "check.verify"])
def test_the_format_needs_no_torch(package):
    """Conversion and checks run where torch is not installed, and start at once."""
    code = f"import sys, wds_convnext.{package}; print('torch' in sys.modules)"

    printed = subprocess.check_output([sys.executable, "-c", code], text=True)

    assert printed.strip() == "False"


@pytest.mark.parametrize("spec", ["{folder}/pets.json", "{folder}/pets.json,{other}/train.json"])
def test_a_manifest_that_is_named_is_used_whatever_its_shards_are_called(tmp_path, spec):
    """Its class names and checksums count, though no shard's name leads to it."""
    folder, other = tmp_path / "a", tmp_path / "b"
    manifest, _ = write_shards(folder, [3, 2]), write_shards(other, [4])
    manifest.rename(folder / "pets.json")

    dataset = open_dataset(spec.format(folder=folder, other=other))

    assert dataset.class_names == ("ant", "bee", "cat", "dog")
    assert len(dataset) == (9 if "," in spec else 5)
    (shard, *_) = dataset.shards
    with open(shard.path, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match="but its manifest says"):
        open_dataset(spec.format(folder=folder, other=other))


@pytest.mark.parametrize("label", [b"1000000", b"99999999", b"3000000000", b"9" * 5000, b"-1"])
def test_a_label_that_is_an_identifier_takes_no_memory(tmp_path, label):
    """Without a manifest the highest label is the number of classes, so it is bounded first."""
    (tmp_path / "a").mkdir()
    write_tar(
        tmp_path / "a" / "train-000.tar", [*sample_members(2), ("x.jpg", b""), ("x.cls", label)]
    )

    with pytest.raises(
        DataError, match=r"key x: (label .* is outside the 1,000,000|the label b'999)"
    ):
        open_dataset(str(tmp_path / "a" / "train-000.tar"))
