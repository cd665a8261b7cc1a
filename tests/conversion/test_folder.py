"""A folder of class folders is converted as it lies there, and what is left out is named."""

import os
import re
from pathlib import Path

import pytest
from parquet_sets import encode, read_folder, read_tar

from wds_convnext.check.verify import verify
from wds_convnext.conversion import convert
from wds_convnext.conversion.sources.folder import find
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import read_manifest


def write_images(folder: Path, *paths: str) -> str:
    """An image at each path below a folder; its pixels depend on the path alone."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.endswith(".png") else "JPEG"
        (folder / path).write_bytes(encode(sum(path.encode()), kind))
    return str(folder)


def shards_of(source, out, **options):
    options = {"jobs": 1, "shuffle": False} | options
    return convert(str(source), out=str(out), quiet=True, **options)


def found(out, split="train"):
    """Class name and bytes of each sample, in order."""
    names = read_manifest(out / f"{split}.json").class_names
    shards = sorted(out.glob(f"{split}-*.tar"))
    return [(names[label], image) for path in shards for _, image, label in read_tar(path)]


def content(folder, *paths):
    return [(Path(path).parts[-2], (Path(folder) / path).read_bytes()) for path in paths]


def test_classes_are_the_folders_sorted_and_rows_their_files_sorted(tmp_path):
    """In the order of names, whatever the file system's is; the split is called train."""
    paths = ["dog/b.jpg", "cat/2.png", "cat/10.jpg", "Zebra/ü.jpeg"]
    source = write_images(tmp_path / "photos", *paths)

    shards_of(source, tmp_path / "out")

    expected = ["Zebra/ü.jpeg", "cat/10.jpg", "cat/2.png", "dog/b.jpg"]
    assert read_manifest(tmp_path / "out/train.json").class_names == ("Zebra", "cat", "dog")
    assert read_manifest(tmp_path / "out/train.json").name == "photos"
    assert found(tmp_path / "out") == content(source, *expected)


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "dev", "test", "Test"])
def test_folders_of_splits_share_their_classes(tmp_path, held_out):
    """A class that only one split has keeps its number in both."""
    paths = ["train/cat/1.jpg", "train/dog/1.jpg", f"{held_out}/bee/1.jpg", f"{held_out}/dog/2.jpg"]
    source = write_images(tmp_path / "in", *paths)

    shards_of(source, tmp_path / "out")

    assert found(tmp_path / "out") == content(source, *paths[:2])
    assert found(tmp_path / "out", held_out) == content(source, *paths[2:])
    assert read_manifest(tmp_path / "out/train.json").class_names == ("bee", "cat", "dog")
    assert not verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True).problems


@pytest.mark.parametrize(
    "paths",
    [
        ["train/1.jpg", "car/1.jpg", "test/1.jpg"],  # no folder below train or test
        ["test_tube/old/1.jpg", "beaker/1.jpg"],
    ],
)
def test_a_class_may_be_called_like_a_split(tmp_path, paths):
    """Of a vehicle, of a laboratory."""
    shards_of(write_images(tmp_path / "in", *paths), tmp_path / "out")

    names = read_manifest(tmp_path / "out/train.json").class_names
    assert names == tuple(sorted({path.split("/")[0] for path in paths}))


def test_a_split_of_a_data_set_may_be_named_itself(tmp_path):
    """`shards imagenet/val` gives a split called val, in its stored order."""
    source = write_images(tmp_path / "val", "cat/1.jpg", "dog/1.jpg")

    (report,) = shards_of(source, tmp_path / "out", shuffle=True).splits

    assert report.split == "val"
    assert found(tmp_path / "out", "val") == content(source, "cat/1.jpg", "dog/1.jpg")


def test_what_is_left_out_is_counted_and_named(tmp_path):
    """Hidden files silently; others by their suffix; images outside of class folders."""
    source = write_images(
        tmp_path / "in", "cat/1.jpg", "cat/deep/er/2.jpg", "cat/._1.jpg", ".git/a/1.jpg", "3.jpg"
    )
    for path in ("cat/a.txt", "cat/b.TXT", "readme.md", "empty/c.xml", "cat/.DS_Store"):
        (tmp_path / "in" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / path).write_text("no image")
    (tmp_path / "in" / "cat" / "sha256-0a1b").write_bytes(encode(7))

    text = str(shards_of(source, tmp_path / "out"))

    images = [image for _, image in found(tmp_path / "out")]
    paths = ["cat/1.jpg", "cat/sha256-0a1b", "cat/deep/er/2.jpg"]
    assert images == [(tmp_path / "in" / path).read_bytes() for path in paths]
    assert "left out: 4 files that are no images (.txt 2, .md 1, .xml 1)" in text
    assert "left out: 1 images that are in no class folder" in text
    assert "class folders without an image: empty" in text
    assert "1 images are in folders below class folders" in text
    assert "images from files, labels from class folders" in text


def test_links_are_followed_but_not_in_circles(tmp_path):
    """To a file, to a folder, to nothing, to the folder above."""
    source = write_images(tmp_path / "in", "cat/1.jpg")
    write_images(tmp_path / "else", "2.jpg", "more/3.jpg")
    (tmp_path / "in/cat/2.jpg").symlink_to(tmp_path / "else/2.jpg")
    (tmp_path / "in/cat/more").symlink_to(tmp_path / "else/more")
    (tmp_path / "in/cat/round").symlink_to(tmp_path / "in/cat")
    (tmp_path / "in/cat/gone.jpg").symlink_to(tmp_path / "nothing.jpg")

    with pytest.raises(DataError, match=r"the first is cat/gone.jpg: cannot be read \(No such"):
        shards_of(source, tmp_path / "out")
    shards_of(source, tmp_path / "out", on_bad="skip")

    images = [image for _, image in found(tmp_path / "out")]
    paths = ["in/cat/1.jpg", "else/2.jpg", "else/more/3.jpg"]
    assert images == [(tmp_path / path).read_bytes() for path in paths]
    report = verify(str(tmp_path / "out"), against=source, jobs=1, quiet=True)
    assert not report.problems
    assert "1 unusable rows were left out" in report.splits[0].notes[0]


def test_bad_images_are_listed_by_path(tmp_path):
    """Another format, no image at all, nothing, a pipe: each with its reason."""
    source = write_images(tmp_path / "in", "cat/1.jpg")
    (tmp_path / "in/cat/2.jpg").write_bytes(b"")
    (tmp_path / "in/cat/3.png").write_bytes(b"<html>403</html>")
    (tmp_path / "in/cat/4.tif").write_bytes(b"II*\0" + bytes(60))
    os.mkfifo(tmp_path / "in/cat/5.jpg")

    report = shards_of(source, tmp_path / "out", on_bad="skip")

    listed = (tmp_path / "out/train.bad.jsonl").read_text()
    assert report.splits[0].num_samples == 1
    for line, expected in zip(
        listed.splitlines(),
        ["2.jpg.*empty", "3.png.*an HTML page", "4.tif.*a TIFF image. Convert", "5.jpg.*regular"],
        strict=True,
    ):
        assert re.search(expected, line)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "in: an empty folder. Expected parquet files"),
        (["1.jpg", "2.jpg"], r"in: a folder of 2 files \(.jpg 2\). Expected .* class folders"),
        (["train/1.jpg", "test/a/1.jpg"], "in/train: 1 images, but no class folders"),
    ],
)
def test_a_folder_without_classes_is_one_line(tmp_path, paths, message):
    """What was found, and what is expected."""
    (tmp_path / "in").mkdir()
    source = write_images(tmp_path / "in", *paths)

    with pytest.raises(UsageError, match=message):
        shards_of(source, tmp_path / "out")


def test_a_test_split_without_classes_is_left_out(tmp_path):
    """As benchmarks publish theirs."""
    source = write_images(tmp_path / "in", "train/cat/1.jpg", "test/1.jpg")

    report = shards_of(source, tmp_path / "out")

    assert report.left_out == {"test": "its images are in no class folders"}


def test_the_bytes_do_not_depend_on_jobs_time_or_the_folder(tmp_path):
    """Another place, another time, made in another order."""
    paths = [f"{name}/{number}.jpg" for name in ("a", "b") for number in range(10)]
    one = write_images(tmp_path / "one" / "in", *paths)
    two = write_images(tmp_path / "two" / "in", *reversed(paths))
    for path in Path(two).rglob("*.jpg"):
        os.utime(path, (0, 0))

    shards_of(one, tmp_path / "a", shuffle=True, num_shards=3)
    shards_of(two, tmp_path / "b", shuffle=True, num_shards=3, jobs=2)

    assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")


def test_another_file_or_size_is_another_input(tmp_path):
    """The shards of before are not taken for those of now."""
    source = write_images(tmp_path / "in", "cat/1.jpg", "dog/1.jpg")
    shards_of(source, tmp_path / "out")
    assert "already complete" in str(shards_of(source, tmp_path / "out"))
    write_images(tmp_path / "in", "dog/2.jpg")

    with pytest.raises(UsageError, match="with other options or from other files"):
        shards_of(source, tmp_path / "out")


def test_columns_of_a_folder_are_refused(tmp_path):
    """An option that would do nothing."""
    source = write_images(tmp_path / "in", "cat/1.jpg")

    with pytest.raises(UsageError, match="--label-column kind: .*in has no columns"):
        shards_of(source, tmp_path / "out", label_column="kind")


def test_rows_of_a_part_are_those_of_the_whole(tmp_path):
    """Under the same numbers, with the paths of the part alone."""
    paths = [f"{name}/{number}.jpg" for name in "ab" for number in range(5)]
    whole = find(write_images(tmp_path / "in", *paths), lambda num, num_bytes: None)["train"]()

    part = whole.part(3, 8)

    assert len(part.paths) == 5
    (of_part,), (of_whole,) = part.rows(4, 7), whole.rows(4, 7)
    assert of_part.first_row == of_whole.first_row == 4
    assert of_part.images == of_whole.images
    assert of_part.labels.tolist() == of_whole.labels.tolist() == [0, 1, 1]
    assert part.locate(6) == whole.locate(6) == ("b/1.jpg", None)
