"""Whatever the kind of a source, the guarantees are the same; also of a source of one's own."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_sets import CLASS_NAMES, encode, image_table, read_folder, sorted_rows, write_split
from test_conversion import ENVIRONMENT, TESTS
from test_folder import found, shards_of

import wds_convnext as wc
from wds_convnext.check.verify import verify
from wds_convnext.conversion.source import RowBatch, SourceSplit
from wds_convnext.errors import DataError
from wds_convnext.shards.dataset import read_manifest

NUM_ROWS = 40


def write_parquet(folder, rows):
    images, labels = zip(*rows)
    write_split(folder, "train", image_table(images, labels), num_files=2)
    return folder


def write_folder(folder, rows):
    for number, (image, label) in enumerate(rows):
        path = folder / CLASS_NAMES[label] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder


def write_csv(folder, rows):
    lines = paths_and_names(folder, rows)
    (folder / "table.csv").write_text("image,label\n" + "".join(f"{p},{c}\n" for p, c in lines))
    return folder / "table.csv"


def write_jsonl(folder, rows):
    lines = [json.dumps({"file": p, "label": c}) for p, c in paths_and_names(folder, rows)]
    (folder / "table.jsonl").write_text("\n".join(lines))
    return folder / "table.jsonl"


def write_parquet_of_paths(folder, rows):
    paths, names = zip(*paths_and_names(folder, rows))
    pq.write_table(pa.table({"image": paths, "label": names}), folder / "train.parquet")
    return folder / "train.parquet"


def paths_and_names(folder, rows):
    write_folder(folder, rows)
    return [(f"{CLASS_NAMES[c]}/{i:04d}.jpg", CLASS_NAMES[c]) for i, (_, c) in enumerate(rows)]


WRITERS = [write_parquet, write_folder, write_csv, write_jsonl, write_parquet_of_paths]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("shuffle", [False, True])
def test_of_the_same_rows_every_source_makes_the_same_shards(tmp_path, write, shuffle):
    """Rows in the order of their classes: equal tars, offsets and index, and verify agrees."""
    rows = list(zip(*sorted_rows(NUM_ROWS)))
    options = {"shuffle": shuffle, "num_shards": 3}
    shards_of(write_parquet(tmp_path / "parquet", rows), tmp_path / "expected", **options)
    source = write(tmp_path / "in", rows)

    jobs = 2 if shuffle and write is write_csv else 1
    shards_of(source, tmp_path / "out", jobs=jobs, **options)

    written, expected = read_folder(tmp_path / "out"), read_folder(tmp_path / "expected")
    manifests = [json.loads(files.pop("train.json")) for files in (written, expected)]
    assert written == expected
    assert manifests[0]["class_names"] == manifests[1]["class_names"]
    assert Counter(found(tmp_path / "out")) == Counter(
        (CLASS_NAMES[label], image) for image, label in rows
    )
    assert not verify(str(tmp_path / "out"), against=str(source), jobs=1, quiet=True).problems


@pytest.mark.parametrize("write", [write_folder, write_csv], ids=["folder", "csv"])
def test_dying_before_any_change_to_the_disk_it_finishes_with_equal_bytes(tmp_path, write):
    """Dead at every moment in turn, as for parquet files: never half done."""
    source = write(tmp_path / "in", list(zip(*sorted_rows(12))))
    shards_of(source, tmp_path / "straight", num_shards=3, shuffle=True)
    command = [sys.executable, TESTS / "crash.py", source, tmp_path / "out", "again"]

    printed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)

    assert set(printed.stdout.splitlines()) == {"9 unfinished", "9 12 samples", "0 12 samples"}
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded(SourceSplit):
    """A source of one's own: images in memory."""

    images: list[bytes | DataError]
    classes: list | np.ndarray

    def labels(self, start, stop):
        yield self.classes[start:stop]

    def rows(self, start, stop):
        for row in range(start, stop):
            yield RowBatch(row, [self.images[row]], self.classes[row : row + 1])


def own_split(classes, *, name="train", **options):
    images = [encode(row) for row in range(len(classes))]
    return Encoded(
        **{"name": name, "num_rows": len(classes), "num_bytes": 10_000, "digest": "1"} | options,
        images=images,
        classes=classes,
    )


def test_a_source_of_one_s_own_is_converted_and_verified(tmp_path):
    """Two splits, labels as names, a fraction; the row of a wrong image is named."""
    classes = ["cat", "dog"] * 15
    splits = [own_split(classes), own_split(["dog"] * 3, name="test", digest="2")]

    wc.convert(splits, out=str(tmp_path / "out"), jobs=1, val_fraction=0.3, quiet=True)

    names = [(name, encode(row)) for row, name in enumerate(classes)]
    both = found(tmp_path / "out") + found(tmp_path / "out", "validation")
    assert Counter(both) == Counter(names)
    assert found(tmp_path / "out", "test") == [("dog", encode(row)) for row in range(3)]
    assert not wc.verify(str(tmp_path / "out"), source=splits, jobs=1, quiet=True).problems
    splits[1].images[1] = encode(99)
    (problem,) = wc.verify(str(tmp_path / "out"), source=splits, jobs=1, quiet=True).problems
    assert "its image is not that of row 1 of test" in problem.what


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (np.array([0, 2, 0], np.uint8), ("0", "1", "2")),
        ([1, 0, 1], ("0", "1")),
        ([True, False, True], ("0", "1")),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b")),
    ],
)
def test_labels_may_be_any_list_of_numbers_or_names(tmp_path, classes, names):
    """Of Python, NumPy or Arrow."""
    wc.convert(own_split(classes), out=str(tmp_path), jobs=1, quiet=True)

    assert read_manifest(tmp_path / "train.json").class_names == names


@pytest.mark.parametrize("classes", [[0.5, 1.0], ["a", 1], [[0], [1]], [1 << 70, 2]])
def test_other_labels_are_one_line(tmp_path, classes):
    """Of a source of one's own, too."""
    with pytest.raises(DataError, match="labels are not"):
        wc.convert(own_split(classes), out=str(tmp_path), jobs=1, quiet=True)


def test_a_source_that_gives_other_rows_than_it_stated_is_one_line(tmp_path):
    """Fewer rows than num_rows, or the same one twice: no shard is written."""
    split = own_split(["a", "b"] * 5)

    class Short(Encoded):
        def rows(self, start, stop):
            yield from list(super().rows(start, stop))[:-1]

    class Twice(Encoded):
        def rows(self, start, stop):
            yield from [*super().rows(start, start + 1), *super().rows(start, stop)]

    class Unlabeled(Encoded):
        def labels(self, start, stop):
            yield self.classes[start : stop - 1]

    for kind, message in (
        (Short, "rows 0 to 10 of train were asked for, and those up to 9 came"),
        (Twice, "row 1 of train was expected, and row 0 came"),
        (Unlabeled, "9 labels of train for 10 rows"),
    ):
        with pytest.raises(DataError, match=message):
            wc.convert(kind(**vars(split)), out=str(tmp_path / "out"), jobs=1, quiet=True)
        assert not list((tmp_path / "out").glob("*.json"))
