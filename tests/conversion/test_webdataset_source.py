"""Shards that others wrote are shuffled, cut anew, and rid of bad samples."""

import json
from pathlib import Path

import pytest
from conftest import write_tar
from parquet_sets import encode, image_table, read_tar, sorted_rows, write_split
from test_conversion import convert

from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import read_manifest


def write_foreign(folder: Path, *, label="cls", split="train", num_shards=2) -> Path:
    """Shards of ten samples, sorted by class, with a text that nobody reads."""
    folder.mkdir(exist_ok=True)
    for shard in range(num_shards):
        members = []
        for number in range(shard * 10, shard * 10 + 10):
            key = f"n{number // 5}/{number:04d}"
            text = str(number // 5) if label == "cls" else json.dumps({"species": number // 5})
            members += [
                (f"{key}.jpg", encode(number)),
                (f"{key}.{label}", text.encode()),
                (f"{key}.txt", b"a caption"),
            ]
        write_tar(folder / f"{split}-{shard:03d}.tar", members)
    return folder


def samples(out: Path, split="train") -> list[tuple[bytes, int]]:
    paths = sorted(out.glob(f"{split}-*.tar"))
    return [(image, label) for path in paths for _, image, label in read_tar(path)]


@pytest.mark.parametrize("spec", ["", "train-*.tar", "train-{000..001}.tar"])
def test_shards_of_others_are_shuffled_and_cut_anew(tmp_path, spec):
    """Every sample once, with its label; the input is proved, and left as it was."""
    folder = write_foreign(tmp_path / "others")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = str(folder / spec) if spec else str(folder)

    convert(source, tmp_path / "out", samples_per_shard=4)

    expected = [(encode(number), number // 5) for number in range(20)]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5
    assert sorted(samples(tmp_path / "out")) == sorted(expected)
    assert samples(tmp_path / "out") != expected
    against = verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True)
    assert against.problems == ()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_labels_in_json_are_found_by_the_field_s_name(tmp_path):
    """--label-column names it, for verify, too, which finds it in the manifest."""
    source = str(write_foreign(tmp_path / "others", label="json", num_shards=1))

    convert(source, tmp_path / "out", label_column="species", shuffle=False)

    assert samples(tmp_path / "out") == [(encode(number), number // 5) for number in range(10)]
    assert verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True).problems == ()


def test_our_own_shards_keep_class_names_and_splits(tmp_path):
    """Stored order, shards of other sizes: the same samples in the same order."""
    images, labels = sorted_rows(12)
    write_split(tmp_path / "in", "train", image_table(images, labels), num_files=3)
    write_split(tmp_path / "in", "test", image_table(images[:4], labels[:4]))
    convert(tmp_path / "in", tmp_path / "first", shuffle=False)

    convert(tmp_path / "first", tmp_path / "second", shuffle=False, num_shards=1)

    assert samples(tmp_path / "second") == samples(tmp_path / "first")
    assert samples(tmp_path / "second", "test") == samples(tmp_path / "first", "test")
    assert read_manifest(tmp_path / "second/train.json").class_names == ("ant", "bee", "cat", "dog")
    with pytest.raises(UsageError, match=r"--out .*first: holds .*, which is read"):
        convert(tmp_path / "first", tmp_path / "first", overwrite=True)


def test_bad_samples_are_listed_and_left_out_on_request(tmp_path):
    """By shard and number in it."""
    members = [("0.jpg", encode(0)), ("0.cls", b"0"), ("1.jpg", b"<html>"), ("1.cls", b"1"),
               ("2.jpg", encode(2)), ("2.cls", b"1")]  # fmt: skip
    write_tar(tmp_path / "train-000.tar", members)

    with pytest.raises(DataError, match=r"1 of 3 .* row 1 of train-000.tar: .*an HTML page"):
        convert(tmp_path / "train-000.tar", tmp_path / "out", shuffle=False)
    convert(tmp_path / "train-000.tar", tmp_path / "out", on_bad="skip", shuffle=False)

    assert samples(tmp_path / "out") == [(encode(0), 0), (encode(2), 1)]
