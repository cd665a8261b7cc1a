"""What is in shards and parquet files, as it is; with and without a manifest."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    CLASS_NAMES,
    command,
    encode_image,
    run,
    sample_members,
    write_shards,
    write_tar,
)
from PIL import Image

from wds_convnext.check.inspect import inspect
from wds_convnext.errors import DataError, ShardError, UsageError


def inspect_one(spec, **options):
    (summary,) = inspect(str(spec), quiet=True, **options)
    return summary


def test_counts_are_those_of_the_data(shards):
    """Of every split of a folder; the label mix is for splits that are trained on."""
    test, train, validation = inspect(str(shards), quiet=True)

    assert [len(summary.image_bytes) for summary in (test, train, validation)] == [11, 50, 13]
    assert train.class_counts.tolist() == [13, 13, 12, 12]
    assert train.dataset.sizes.tolist() == [21, 1, 28]
    assert train.survey.formats == {"jpg": 50}
    assert train.survey.short_sides == {20: 50}
    assert train.survey.long_sides == {24: 50}
    assert train.label_mix is not None
    assert validation.label_mix is None


def test_a_manifest_only_adds_the_names(shards, tmp_path):
    """Tar files alone give the same numbers."""
    for shard in shards.glob("train-*.tar"):
        shutil.copy(shard, tmp_path)
    alone, listed = inspect_one(tmp_path), inspect_one(shards / "train.json")

    named, numbered = listed.to_json(), alone.to_json()

    assert numbered.pop("class_names") == ["0", "1", "2", "3"]
    assert named.pop("class_names") == CLASS_NAMES
    for about in (named, numbered):
        del about["dataset"], about["shards"]
    assert numbered == named


def test_formats_and_unusable_images_are_counted(tmp_path):
    """A bad image is a count and a reason, not the end."""
    images = [encode_image(0, format="PNG"), encode_image(1, format="WEBP"), b"", b"no image"]
    members = [
        member
        for i, image in enumerate(images)
        for member in ((f"{i}.png", image), (f"{i}.cls", b"0"))
    ]
    shard = write_tar(tmp_path / "train-000.tar", members)

    summary = inspect_one(shard)

    assert summary.survey.formats == {"png": 1, "webp": 1}
    assert summary.unusable == {"empty": 1, "not an image (begins with b'no image')": 1}
    assert summary.image_bytes.tolist() == list(map(len, images))


def test_the_report_as_text(tmp_path):
    """Every line of it."""
    write_shards(tmp_path / "pictures", [3, 5])

    lines = inspect_one(tmp_path / "pictures", batch_size=4).lines()

    assert lines.pop(5).startswith("  bytes per image: ")
    assert lines.pop().split()[0] == "8"  # the buffer; the rest depends on the order
    assert lines == [
        "train: 8 samples, 4 classes, 2 shards, 0.0 MB",
        "  samples per shard: 3 to 5, median 4",
        "  formats: jpg 8",
        "  modes: RGB 8",
        "  pixels: short side 20 to 20, median 20; long side 24 to 24, median 24",
        "  samples per class: 2 to 2, median 2",
        "    ant          2  ##############################",
        "    bee          2  ##############################",
        "    cat          2  ##############################",
        "    dog          2  ##############################",
        "  label mix: distinct classes in a batch of 4; 3.1 in a uniform order",
        "    shuffle buffer  classes  of uniform  shards a rank opens in 8 steps",
    ]


def test_many_classes_are_summed_up(tmp_path):
    """The largest and the smallest are shown; JSON has all."""
    labels = [label for label in range(40) for _ in range(label + 1)]
    image = encode_image(0, size=(8, 8))
    members = [
        member
        for i, label in enumerate(labels)
        for member in ((f"{i}.jpg", image), (f"{i}.cls", str(label).encode()))
    ]
    summary = inspect_one(write_tar(tmp_path / "train-000.tar", members))

    lines = [line for line in summary.lines() if line.endswith("#")]

    shown = [tuple(map(int, line.split()[:2])) for line in lines]
    assert shown[:10] == [(label, label + 1) for label in range(39, 29, -1)]
    assert shown[10:] == [(label, label + 1) for label in range(9, -1, -1)]
    assert summary.to_json()["class_counts"] == list(range(1, 41))


def test_shards_that_are_not_there_or_damaged_are_errors(tmp_path):
    """Half a description would mislead."""
    manifest = write_shards(tmp_path, [3, 2])
    (tmp_path / "train-001.tar").unlink()

    with pytest.raises(ShardError, match="train-001.tar: No such file"):
        inspect(str(manifest), quiet=True)
    with pytest.raises(ShardError, match="no shard matches"):
        inspect(str(tmp_path / "nothing"), quiet=True)


def test_labels_that_cannot_be_counted_are_errors(tmp_path):
    """Beyond the manifest's classes, or no class number at all."""
    manifest = write_shards(tmp_path, [3])
    members = sample_members(3)
    members[5] = ("0002.cls", b"9")
    shard = write_tar(tmp_path / "train-000.tar", members)

    with pytest.raises(DataError, match="a label of 9, but the manifest names 4 classes"):
        inspect(str(manifest), quiet=True)
    members[5] = ("0002.cls", b"-9")
    write_tar(tmp_path / "train-000.tar", members)
    (tmp_path / "train-000.idx").unlink()
    manifest.unlink()
    with pytest.raises(DataError, match="key 0002: label -9 is outside"):
        inspect(str(shard), quiet=True)


def test_parquet_files_are_described(parquet):
    """What their footers say: schema, rows, row groups, compression, columns to convert."""
    summaries = {summary.split: summary for summary in inspect(str(parquet), quiet=True)}
    train = summaries["train"]
    footers = [pq.read_metadata(path) for path in train.paths]

    about = json.loads(json.dumps(train.to_json()))

    assert sorted(summaries) == ["test", "train", "validation"]
    assert about["num_rows"] == 50
    assert about["group_rows"] == [7, 7, 7, 1, 7, 7, 7, 7]
    assert len(about["group_rows"]) == sum(footer.num_row_groups for footer in footers)
    assert about["schema"] == {"image": "struct<bytes: binary, path: string>", "label": "int64"}
    assert about["image_and_label"] == ["image", "label"]
    assert about["class_names"] == CLASS_NAMES
    leaves = {leaf["name"]: leaf["compression"] for leaf in about["leaves"]}
    assert leaves == {"image.bytes": "SNAPPY", "image.path": "SNAPPY", "label": "SNAPPY"}
    assert "  row groups: 8 of 1 to 7 rows" in train.lines()
    assert "  images in image, labels in label" in train.lines()


def test_a_parquet_file_of_anything_is_described(tmp_path):
    """Also where no column holds images: that is what one looks for."""
    path = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"x": [1, 2, 3]}), path, compression="zstd")

    summary = inspect_one(path)

    assert summary.num_rows == 3
    assert summary.image_and_label is None
    assert summary.leaves[0].compression == "ZSTD"


def test_the_sheet_shows_each_class_in_its_row(tmp_path):
    """Classes of one colour each; a sample that does not decode is a red square."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    members = []
    for i in range(12):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), colours[i % 3]).save(file, "PNG")
        image = b"no image" if i == 0 else file.getvalue()
        members += [(f"{i}.png", image), (f"{i}.cls", str(i % 3).encode())]
    write_tar(tmp_path / "train-000.tar", members[:10])
    write_tar(tmp_path / "train-001.tar", members[10:])

    inspect_one(tmp_path, sheet=str(tmp_path / "sheet.png"))

    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 96, 180 + 10 * 96, 3)
    middles = sheet[48::96, 180 + 48 :: 96]
    assert middles[0, 0].tolist() == [178, 34, 34]
    assert (middles[0, 1:4] == colours[0]).all()
    assert (middles[1, :4] == colours[1]).all()
    assert (middles[2, :4] == colours[2]).all()
    assert (middles[:, 4:] == 255).all()
    assert (sheet[:96, :180] < 128).any()  # the name


def test_a_sheet_is_of_one_split(shards, parquet, tmp_path):
    """One line says what to name."""
    with pytest.raises(UsageError, match="there are test, train, validation"):
        inspect(str(shards), sheet=str(tmp_path / "sheet.png"), quiet=True)
    with pytest.raises(UsageError, match="drawn from shards"):
        inspect(str(parquet), sheet=str(tmp_path / "sheet.png"), quiet=True)
    with pytest.raises(UsageError, match="--sheet .*: No such file"):
        inspect(str(shards / "train.json"), sheet=str(tmp_path / "no" / "s.png"), quiet=True)


@pytest.mark.slow
def test_the_command_line_prints_text_and_json(shards, tmp_path):
    """The same with several processes."""
    sheet = tmp_path / "sheet.png"
    text = run(command("inspect", shards / "train.json", "--jobs", 1)).stdout
    as_json = run(command("inspect", shards, "--jobs", 2, "--json")).stdout
    run(command("inspect", shards / "test.json", "--jobs", 1, "--sheet", sheet))

    assert text.startswith("train: 50 samples, 4 classes, 3 shards, ")
    splits = json.loads(as_json)["splits"]
    assert [split["split"] for split in splits] == ["test", "train", "validation"]
    assert [split["num_samples"] for split in splits] == [11, 50, 13]
    assert Path(sheet).stat().st_size > 0
