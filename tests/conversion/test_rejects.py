"""What a conversion leaves out or refuses, and what it says of the rest."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from parquet_sets import encode, image_table, read_tar, sorted_rows, write_small_source, write_split
from test_conversion import convert, expected_samples, samples_of

from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader


@pytest.fixture
def source(tmp_path):
    return write_small_source(tmp_path / "tiny")


@pytest.fixture
def flawed(tmp_path):
    """20 rows, five of them unusable, each in its way; the list of (row, reason)."""
    images, labels = sorted_rows(20)
    images[2], images[5], images[7], images[11] = b"", None, b"<html>", images[11][:200]
    labels[13] = None
    write_split(tmp_path / "flawed", "train", image_table(images, labels), num_files=2)
    reasons = {2: "empty", 5: "null", 7: "not an image", 11: "cut short|decode", 13: "label"}
    return str(tmp_path / "flawed"), reasons


@pytest.mark.parametrize("shuffle", [False, True])
def test_unusable_rows_are_an_error_that_lists_all_of_them(flawed, tmp_path, shuffle):
    """By default nothing reads as complete, and the list names file, row and reason."""
    source, reasons = flawed

    with pytest.raises(DataError, match=r"5 of 20 rows are unusable.*--on-bad skip") as caught:
        convert(source, tmp_path / "out", shuffle=shuffle)

    listing = re.search(r"listed in (\S+)\. ", str(caught.value))[1]
    listed = [json.loads(line) for line in Path(listing).read_text().splitlines()]
    assert [entry["row"] for entry in listed] == list(reasons)
    for entry, reason in zip(listed, reasons.values()):
        assert re.search(reason, entry["reason"])
    assert (listed[-1]["file"], listed[-1]["row_in_file"]) == ("train-00001-of-00002.parquet", 3)
    assert not (tmp_path / "out/train.json").exists()


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_unusable_rows_are_left_out_and_listed_on_request(flawed, tmp_path, shuffle, jobs):
    """Also after an error; keys stay row numbers; shuffled shards still differ by at most one."""
    source, reasons = flawed
    out = tmp_path / "out"
    with pytest.raises(DataError):
        convert(source, out, shuffle=shuffle)

    (report,) = convert(source, out, shuffle=shuffle, on_bad="skip", jobs=jobs).splits

    kept = [sample for sample in expected_samples(20) if int(sample[0]) not in reasons]
    assert sorted(samples_of(out)) == kept
    assert sum(report.skipped.values()) == 5
    assert len((out / "train.bad.jsonl").read_text().splitlines()) == 5
    (again,) = convert(source, out, shuffle=shuffle).splits
    assert again.already_complete
    assert again.skipped == report.skipped
    if shuffle:
        assert sorted(shard.num_samples for shard in report.shards) == [7, 8]


@pytest.mark.parametrize("labels", [[-1] * 5, [None] * 5, None])
def test_a_split_without_labels_is_left_out_and_said(tmp_path, labels):
    """The test split of a benchmark: all -1, all null, or no such column; others convert."""
    images = [encode(i) for i in range(5)]
    write_split(tmp_path / "in", "train", image_table(images, [0, 1, 2, 3, 0]))
    table = image_table(images, pa.array(labels or [0] * 5, pa.int64()))
    write_split(tmp_path / "in", "test", table if labels else table.drop_columns("label"))

    report = convert(tmp_path / "in", tmp_path / "out")

    assert [split.split for split in report.splits] == ["train"]
    assert "test: left out, " in str(report)
    assert "columns: images from image, labels from label" in str(report)
    assert not list((tmp_path / "out").glob("test*"))
    found = verify(str(tmp_path / "out"), against=str(tmp_path / "in"), jobs=1, quiet=True)
    assert found.problems == ()


def test_a_training_split_without_labels_is_an_error(tmp_path):
    """It is never left out for the sake of a test split."""
    images = [encode(i) for i in range(3)]
    write_split(tmp_path / "in", "train", image_table(images, [-1, -1, -1]))
    write_split(tmp_path / "in", "test", image_table(images, [0, 1, 2]))

    with pytest.raises(DataError, match="train cannot be used: none of its 3 rows has a label"):
        convert(tmp_path / "in", tmp_path / "out")


def test_advice_names_no_test_split(tmp_path):
    """Whatever is larger."""
    images = [encode(i) for i in range(4)]
    write_split(tmp_path / "in", "mydata_test", image_table(images, [0, 1, 2, 3]))
    alone = convert(tmp_path / "in", tmp_path / "alone")
    write_split(tmp_path / "in", "mydata_train", image_table(images[:1], [0]))

    both = convert(tmp_path / "in", tmp_path / "both")

    assert "train --shards" not in str(alone)
    assert f"train --shards {tmp_path}/both/mydata_train.json" in str(both)
    assert [key for key, _, _ in read_tar(tmp_path / "both" / "mydata_test-000.tar")] == [
        f"{row:09d}" for row in range(4)
    ]


def test_all_formats_keep_their_extension_and_are_reported(tmp_path):
    """The report counts formats, modes, and what a reader may trip over."""
    formats = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]
    images = [encode(i, image_format) for i, image_format in enumerate(formats)]
    images.append(encode(9, "JPEG", mode="CMYK"))
    write_split(tmp_path / "in", "train", image_table(images, [0] * 6))

    report = convert(str(tmp_path / "in"), tmp_path / "out", shuffle=False)

    (split,) = report.splits
    assert split.survey.formats == {"jpg": 2, "png": 1, "webp": 1, "bmp": 1, "gif": 1}
    assert split.survey.unusual["mode CMYK"] == 1
    assert "train: 6 samples, 4 classes, 1 shard, " in str(report)
    assert "next: wds-convnext verify" in str(report)
    dataset = open_dataset(str(tmp_path / "out/train.json"))
    assert SampleReader(dataset).read(2) == (images[2], 0)


def test_a_pillow_decode_finds_what_the_header_hides(tmp_path):
    """--check decode."""
    damaged = bytearray(encode(1, "PNG", size=(64, 64)))
    damaged[len(damaged) // 2] ^= 0xFF
    write_split(tmp_path / "in", "train", image_table([encode(0), bytes(damaged)], [0, 1]))

    with pytest.raises(DataError, match="1 of 2 rows are unusable"):
        convert(str(tmp_path / "in"), tmp_path / "out", check="decode")


def test_check_decode_judges_a_jpeg_as_training_does(tmp_path):
    """Bytes left over before the end are harmless; pixels that were never decoded are not."""
    whole = encode(0, size=(64, 64))
    left_over, torn = whole[:-2] + b"left over" + whole[-2:], whole[: len(whole) // 2] + whole[-2:]
    write_split(tmp_path / "in", "train", image_table([left_over, torn], [0, 1]))

    with pytest.raises(DataError, match=r"1 of 2 rows .* row 1 of .*does not decode \(Corrupt"):
        convert(str(tmp_path / "in"), tmp_path / "out", check="decode")
