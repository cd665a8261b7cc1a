"""Splits by fraction: by content, so that rows stay where they are and duplicates together."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from parquet_sets import encode, image_table, read_tar, sorted_rows, write_split
from test_folder import shards_of

from wds_convnext.check.verify import verify
from wds_convnext.errors import UsageError
from wds_convnext.shards.dataset import read_manifest

USES = ("train", "validation", "test")
FRACTIONS = {"val_fraction": 0.2, "test_fraction": 0.1}


def write_source(folder, kind, num_rows=60):
    """Rows 0 to num_rows, as a parquet file or as class folders."""
    images, labels = sorted_rows(num_rows)
    if kind == "parquet":
        write_split(folder, "train", image_table(images, labels), num_files=2)
    for row, (image, label) in enumerate(zip(images, labels)):
        path = Path(folder, f"class{label}", f"{row:03d}.jpg")
        if kind == "folder":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    return str(folder)


def samples_of(out):
    """Key, image and label of each sample, by split."""
    return {
        use: [sample for path in sorted(out.glob(f"{use}-*.tar")) for sample in read_tar(path)]
        for use in USES
    }


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_every_row_is_in_one_split_under_its_number_in_the_source(tmp_path, kind, shuffle):
    """And `verify --against` finds each; the same rows, whatever the kind of source."""
    source = write_source(tmp_path / "in", kind)

    shards_of(source, tmp_path / "out", shuffle=shuffle, **FRACTIONS)

    found = samples_of(tmp_path / "out")
    images, labels = sorted_rows(60)
    rows = sorted(sample for split in found.values() for sample in split)
    assert rows == [(f"{row:09d}", images[row], labels[row]) for row in range(60)]
    assert len(found["train"]) > len(found["validation"]) > len(found["test"]) > 0
    report = verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True)
    assert not report.problems


def test_with_two_jobs_the_bytes_are_the_same(tmp_path):
    """As always."""
    source = write_source(tmp_path / "in", "folder")

    for jobs in (1, 2):
        shards_of(source, tmp_path / str(jobs), jobs=jobs, shuffle=True, **FRACTIONS)

    assert samples_of(tmp_path / "1") == samples_of(tmp_path / "2")


def test_more_rows_and_another_fraction_move_no_row(tmp_path):
    """The splits of few rows are parts of those of many; test stays when validation grows."""
    for num_rows in (30, 60):
        source = write_source(tmp_path / f"in{num_rows}", "parquet", num_rows)
        shards_of(source, tmp_path / f"out{num_rows}", **FRACTIONS)
    shards_of(source, tmp_path / "more", val_fraction=0.4, test_fraction=0.1)

    few, many, more = (
        {use: {image for _, image, _ in split} for use, split in samples_of(out).items()}
        for out in (tmp_path / "out30", tmp_path / "out60", tmp_path / "more")
    )
    assert all(few[use] <= many[use] for use in USES)
    assert few != many
    assert more["test"] == many["test"]
    assert more["validation"] > many["validation"]


def test_exact_duplicates_stay_together(tmp_path):
    """No image is trained on and tested on."""
    images = [encode(number % 20) for number in range(60)]
    write_split(tmp_path / "in", "train", image_table(images, [n % 4 for n in range(60)]))

    shards_of(tmp_path / "in", tmp_path / "out", **FRACTIONS)

    owners = {
        (image, use) for use, rows in samples_of(tmp_path / "out").items() for _, image, _ in rows
    }
    assert max(Counter(image for image, _ in owners).values()) == 1
    assert len({use for _, use in owners}) > 1


def test_counts_per_class_are_printed_and_a_class_without_a_row_is_named(tmp_path):
    """Of few rows a class may have none in a split."""
    source = write_source(tmp_path / "in", "folder", 12)

    text = str(shards_of(source, tmp_path / "out", val_fraction=0.4, test_fraction=0.2))

    for samples in samples_of(tmp_path / "out").values():
        counts = Counter(label for _, _, label in samples)
        listed = ", ".join(f"class{label} {counts[label]}" for label in range(4))
        assert f"rows per class: {listed}\n" in text
        missing = ", ".join(f"class{label}" for label in range(4) if not counts[label])
        assert not missing or f"classes without a row here: {missing}\n" in text
    assert "classes without a row here" in text


def test_bad_rows_are_listed_under_their_numbers_in_the_source(tmp_path):
    """So that verify knows them."""
    images, labels = sorted_rows(60)
    images[7] = images[50] = b"no image"
    images[20] = None
    write_split(tmp_path / "in", "train", image_table(images, labels))

    shards_of(tmp_path / "in", tmp_path / "out", on_bad="skip", shuffle=True, **FRACTIONS)

    lines = [line for path in tmp_path.glob("out/*.bad.jsonl") for line in path.open()]
    assert sorted(json.loads(line)["row"] for line in lines) == [7, 20, 50]
    report = verify(str(tmp_path / "out"), against=str(tmp_path / "in"), jobs=1, quiet=True)
    assert not report.problems


def test_verify_finds_a_row_that_another_split_has(tmp_path):
    """Shards of validation in place of test's, with a manifest that fits them."""
    source = write_source(tmp_path / "in", "parquet")
    shards_of(source, tmp_path / "out", **FRACTIONS)
    manifest = json.loads((tmp_path / "out/validation.json").read_text())
    manifest["options"]["selection"]["val"] = 0.3
    (tmp_path / "out/validation.json").write_text(json.dumps(manifest))

    report = verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True)

    assert any("rows of the input are in no shard" in problem.what for problem in report.problems)


def test_a_folder_converted_without_the_option_reads_as_complete(tmp_path):
    """Its identity has no key of it; with the option it is another conversion."""
    fixture = Path(__file__).parents[1] / "fixtures" / "parquet"
    shards_of(fixture, tmp_path / "out")

    assert "selection" not in read_manifest(tmp_path / "out/train.json").options
    assert "already complete" in str(shards_of(fixture, tmp_path / "out"))
    shutil.copytree(fixture, tmp_path / "in")
    (tmp_path / "in" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UsageError, match="holds train with other options"):
        shards_of(tmp_path / "in", tmp_path / "out", **FRACTIONS)


def test_a_part_without_rows_is_named_and_one_without_shards_is_a_problem(tmp_path):
    """Of few rows all may fall to one side."""
    source = write_source(tmp_path / "in", "folder", 12)
    report = shards_of(source, tmp_path / "tiny", val_fraction=1e-9)
    assert report.left_out == {"validation": "none of the 12 rows of train is in this fraction"}
    assert not verify(str(tmp_path / "tiny"), against=source, jobs=1, quiet=True).problems
    shards_of(source, tmp_path / "out", val_fraction=0.5)
    for path in tmp_path.glob("out/train*"):
        path.unlink()

    (problem,) = verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True).problems

    assert re.fullmatch(r"missing, and .* has \d+ rows of this split", problem.what)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 0.1}, "--test-fraction: the source has a split for it, test"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "nothing is left for training"),
        ({"val_fraction": 1}, "--val-fraction 1: expected a number > 0 and < 1"),
        ({"val_fraction": 0}, "--val-fraction 0: expected a number > 0 and < 1"),
    ],
)
def test_fractions_that_make_no_sense_are_refused(tmp_path, options, message):
    """Before anything is written."""
    source = Path(__file__).parents[1] / "fixtures" / "parquet"

    with pytest.raises(UsageError, match=message):
        shards_of(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
