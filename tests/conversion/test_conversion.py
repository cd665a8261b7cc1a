"""Conversion keeps every row, gives the same bytes always, and is never half done."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from parquet_sets import (
    image_table,
    read_folder,
    read_tar,
    sorted_rows,
    write_small_source,
    write_split,
)

import wds_convnext.conversion
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader

TESTS = Path(__file__).parents[1]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS.parent)}


@pytest.fixture
def source(tmp_path):
    return write_small_source(tmp_path / "tiny")


def convert(source, out, **options):
    options = {"jobs": 1} | options
    return wds_convnext.conversion.convert(source, out=out, quiet=True, **options)


def samples_of(out, split="train"):
    return [
        sample for path in sorted(Path(out).glob(f"{split}-*.tar")) for sample in read_tar(path)
    ]


def expected_samples(num_rows, start=0):
    images, labels = sorted_rows(num_rows, start=start)
    return [(f"{row:09d}", images[row], labels[row]) for row in range(num_rows)]


def start_process(source, out, stderr=subprocess.DEVNULL, **options):
    call = f"convert({source!r}, out={str(out)!r}, **{options})"
    code = f"from wds_convnext.conversion import convert; {call}"
    return subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {code}"],
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=stderr,
    )


def test_there_is_a_shard_for_every_file_a_sidecar_for_every_shard_and_a_manifest(tmp_path):
    """With mini-imagenet's 13, 3 and 2 files: train-000..012, validation-000..002, …"""
    for split, num_files in (("train", 13), ("validation", 3), ("test", 2)):
        write_split(tmp_path / "in/data", split, image_table(*sorted_rows(26)), num_files=num_files)

    report = convert(str(tmp_path / "in"), tmp_path / "out")

    names = [
        f"{split}-{i:03d}{extension}"
        for split, num_files in (("test", 2), ("train", 13), ("validation", 3))
        for i in range(num_files)
        for extension in (".idx", ".tar")
    ]
    names += [f"{s}.{kind}" for s in ("test", "train", "validation") for kind in ("json", "index")]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    assert {split.split: split.num_samples for split in report.splits} == {
        "test": 26, "train": 26, "validation": 26,
    }  # fmt: skip
    assert read_manifest(tmp_path / "out/train.json").name == "in"


def test_in_stored_order_every_row_is_there_once_in_its_place(source, tmp_path):
    """Same bytes, same labels, row numbers as keys, one file after the other."""
    convert(source, tmp_path / "out", shuffle=False)

    assert samples_of(tmp_path / "out") == expected_samples(40)
    assert samples_of(tmp_path / "out", "test") == expected_samples(8, start=100)


def test_shuffled_every_row_is_there_once_and_classes_are_mixed(source, tmp_path):
    """A permutation of the training rows; each shard a fair sample; the test split as stored."""
    convert(source, tmp_path / "out")

    samples = samples_of(tmp_path / "out")
    assert sorted(samples) == expected_samples(40)
    assert samples != expected_samples(40)
    shards = [read_tar(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    assert sorted(map(len, shards)) == [13, 13, 14]
    for shard in shards:
        counts = Counter(label for _, _, label in shard)
        assert len(counts) == 4
        assert set(counts.values()) <= {3, 4}
    assert samples_of(tmp_path / "out", "test") == expected_samples(8, start=100)


def test_our_reader_reads_what_was_written(source, tmp_path):
    """Offsets, labels, sizes and checksums of manifest and sidecars fit the shards."""
    convert(source, tmp_path / "out")

    dataset = open_dataset(str(tmp_path / "out/train.json"))

    reader = SampleReader(dataset)
    read = [reader.read(number) for number in range(len(dataset))]
    assert dataset.index.has_checksums
    assert read == [(image, label) for _, image, label in samples_of(tmp_path / "out")]
    assert dataset.class_names == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"num_shards": 5}])
def test_the_bytes_do_not_depend_on_jobs_time_or_the_folder(source, tmp_path, options):
    """One process or two, today or tomorrow, here or there: equal files."""
    convert(source, tmp_path / "one", **options)
    moved = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(source, moved)
    for path in moved.iterdir():
        os.utime(path, (0, 0))

    convert(str(moved), tmp_path / "two", jobs=2, **options)

    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")


def test_the_seed_decides_the_order(source, tmp_path):
    """Another seed, another order, of the same samples."""
    for seed in (0, 1):
        convert(source, tmp_path / str(seed), seed=seed)

    zero, one = (samples_of(tmp_path / str(seed)) for seed in (0, 1))
    assert zero != one
    assert sorted(zero) == sorted(one)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("option", "value", "sizes"),
    [
        ("num_shards", 1, [40]),
        ("num_shards", 7, [5, 5, 6, 6, 6, 6, 6]),
        ("samples_per_shard", 15, [13, 13, 14]),
        ("samples_per_shard", 10, [10, 10, 10, 10]),
        ("shard_size", 50_000, [13, 13, 14]),
    ],
)
def test_sizes_are_as_asked(source, tmp_path, option, value, sizes, shuffle):
    """Shards differ by at most one sample; none has more samples than asked for."""
    source = f"{source}/train-*.parquet"

    (report,) = convert(source, tmp_path, shuffle=shuffle, **{option: value}).splits

    assert sorted(shard.num_samples for shard in report.shards) == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 2, "shard_size": 3}, "--num-shards and --shard-size exclude each other"),
        ({"num_shards": 0}, "--num-shards 0: expected an integer >= 1."),
        ({"num_shards": 41}, "41 shards for 40 rows of train"),
    ],
)
def test_options_that_make_no_sense_are_refused(source, tmp_path, options, message):
    """Before anything is written."""
    with pytest.raises(UsageError, match=message):
        convert(f"{source}/train-*", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_vanished_input_is_one_line(source, tmp_path, monkeypatch):
    """A file deleted after its footer was read."""
    from wds_convnext import conversion as module

    find_class_names = module.find_class_names

    def vanish(splits, **options):
        Path(source, "train-00001-of-00003.parquet").unlink()
        return find_class_names(splits, **options)

    monkeypatch.setattr(module, "find_class_names", vanish)

    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: not readable"):
        convert(source, tmp_path / "out")


def test_conversion_has_no_use_for_torch():
    """Importing it takes neither torch nor webdataset, which would double the memory."""
    code = "import sys, wds_convnext.conversion; print({'torch', 'webdataset'} & set(sys.modules))"
    command = [sys.executable, "-c", code]

    printed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)

    assert printed.stdout.strip() == "set()"
