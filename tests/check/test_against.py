"""Shards that fit their manifest are compared with the parquet files that they were made from."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_parquet
from parquet_sets import image_table, sorted_rows, write_split
from test_verify import edit_members, problems_of, reseal

from wds_convnext.check.verify import verify
from wds_convnext.conversion import convert
from wds_convnext.errors import UsageError
from wds_convnext.shards.dataset import read_manifest


@pytest.fixture
def data(shards, tmp_path) -> Path:
    """A copy of the converted data set, to be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "data"))


def swap_labels(members):
    members[1], members[-1] = (members[1][0], members[-1][1]), (members[-1][0], members[1][1])


def swap_images(members):
    members[0], members[2] = (members[0][0], members[2][1]), (members[2][0], members[0][1])


def lose_the_first(members):
    del members[:2]


def repeat_a_row_of_the_next_shard(members):
    members += [("000000021.jpg", members[0][1]), ("000000021.cls", members[1][1])]


def invent_a_row(members):
    members += [("000000050.jpg", members[0][1]), ("000000050.cls", members[1][1])]


def rename_a_key(members):
    members[:2] = [("first.jpg", members[0][1]), ("first.cls", members[1][1])]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (swap_labels, ["{}, key 000000000: label 1, but 0 in row 0 of {file}",
                       "{}, key 000000020: label 0, but 1 in row 20 of {file}"]),
        (swap_images, ["{}, key 000000000: its image is not that of row 0 of {file}",
                       "{}, key 000000001: its image is not that of row 1 of {file}"]),
        (lose_the_first, ["{json}: 1 rows of the input are in no shard, the first is row 0 of "
                          "{file}"]),
        (repeat_a_row_of_the_next_shard, ["key 000000021 comes 2 times",
                                          "key 000000021: comes 2 times"]),
        (invent_a_row, ["{}, key 000000050: no row of the input, which has 50"]),
        (rename_a_key, ["{}: a key that is no number: no row of the input",
                        "{json}: 1 rows of the input are in no shard"]),
    ],
)  # fmt: skip
def test_against_finds_what_fits_the_manifest_but_not_the_input(parquet, data, fault, found):
    """Shards, manifest and sidecars agree with each other; the input tells."""
    edit_members(data / "train-000.tar", fault)
    reseal(data / "train.json")

    problems = problems_of(data / "train.json", against=str(parquet))

    places = {"file": "train-00000-of-00003.parquet", "json": data / "train.json"}
    for text in found:
        expected = text.format(data / "train-000.tar", **places)
        assert any(expected in problem for problem in problems), problems


def test_against_counts_the_rows_of_a_broken_shard_as_missing(parquet, data):
    """The shard is named, and how many rows are lost with it."""
    shard = data / "train-000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])

    problems = problems_of(data / "train.json", against=str(parquet))

    assert f"{shard}: 5,000 bytes, but its manifest says" in problems[0]
    assert "21 rows of the input are in no shard" in problems[-1]


def test_rows_that_the_conversion_left_out_are_told_from_lost_ones(tmp_path):
    """They must be listed, and be unusable indeed."""
    images, labels = sorted_rows(12)
    images[3], images[8] = b"no image", None
    write_split(tmp_path / "in", "train", image_table(images, labels))
    convert(str(tmp_path / "in"), out=str(tmp_path / "out"), on_bad="skip", jobs=1, quiet=True)

    report = verify(str(tmp_path / "out"), against=str(tmp_path / "in"), jobs=1, quiet=True)

    listing = tmp_path / "out" / "train.bad.jsonl"
    assert report.problems == ()
    assert report.splits[0].notes == (f"2 unusable rows were left out: {listing}",)
    listing.write_text(listing.read_text().replace('"row": 3', '"row": 4'))
    problems = problems_of(tmp_path / "out", against=str(tmp_path / "in"))
    assert problems[0].startswith(f"{listing}: leaves out row 4 of train-00000-of-00001.parquet")
    assert "1 rows of the input are in no shard, the first is row 3" in problems[1]


def test_other_class_names_than_the_input_are_a_problem(parquet, data):
    """Equal numbers then mean other classes."""
    manifest = read_manifest(data / "test.json")
    replace(manifest, class_names=("dog", "cat", "bee", "ant")).write_manifest(data / "test.json")

    (problem,) = problems_of(data / "test.json", against=str(parquet))

    assert "class names are not those of" in problem


def test_string_labels_are_compared_by_the_manifest_s_names(tmp_path):
    """A data set without class names in its metadata."""
    images, _ = sorted_rows(6)
    table = image_table(images, ["dog", "ant", "ant", "cat", "dog", "cat"], class_names=None)
    write_split(tmp_path / "in", "train", table)
    convert(str(tmp_path / "in"), out=str(tmp_path / "out"), jobs=1, quiet=True)

    assert problems_of(tmp_path / "out", against=str(tmp_path / "in")) == []


def test_against_another_input_is_refused(data, shards, parquet, tmp_path):
    """Where there is nothing to compare: said so, instead of a long list of differences."""
    write_parquet(tmp_path / "other", "train", [5])

    with pytest.raises(UsageError, match="holds the splits train, not test"):
        verify(str(data), against=str(tmp_path / "other"), jobs=1, quiet=True)
    with pytest.raises(UsageError, match="whole splits"):
        verify(str(data / "train-000.tar"), against=str(parquet), jobs=1, quiet=True)
    (data / "train.json").unlink()
    with pytest.raises(UsageError, match="no manifest"):
        verify(str(data / "train-*.tar"), against=str(parquet), jobs=1, quiet=True)


def test_a_split_of_the_input_without_shards_is_a_problem(parquet, data):
    """Of a folder; a part of it may be named on purpose."""
    for path in data.glob("test*"):
        path.unlink()

    problems = problems_of(data, against=str(parquet))

    assert problems == [f"{data}/test.json: missing, and {parquet} has 11 rows of this split"]
    assert problems_of(data / "train.json", against=str(parquet)) == []
