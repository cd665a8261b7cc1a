"""Splits, columns, classes and rows are found in parquet files as they exist in the world."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parquet_sets import CLASS_NAMES, encode, image_table, sorted_rows, write_split

from wds_convnext.conversion.opening import find_class_names
from wds_convnext.conversion.source import UNLABELLED, label_numbers
from wds_convnext.conversion.sources.columns import find_columns
from wds_convnext.conversion.sources.parquet import open_split
from wds_convnext.conversion.sources.parquet_files import find_splits, split_of
from wds_convnext.errors import DataError, ShardError, UsageError
from wds_convnext.shards.tar import read_tar


def rows_of(split, class_names=CLASS_NAMES, start=0, stop=None):
    """Row number, image bytes (None where there is an error in their place) and class number."""
    return [
        (batch.first_row + i, None if isinstance(image, DataError) else bytes(image), int(label))
        for batch in split.rows(start, split.num_rows if stop is None else stop)
        for i, (image, label) in enumerate(
            zip(batch.images, label_numbers(batch.labels, class_names), strict=True)
        )
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00013.parquet", "train"),
        ("validation-00000-of-00003-a09b74b3ef9c3b56.parquet", "validation"),
        ("train.parquet", "train"),
        ("test_07.parquet", "test"),
        ("mini_train-00000-of-00001.parquet", "mini_train"),
        ("default/test/0000.parquet", "test"),
        ("train/part-00000-6b2e0f3c-21e5-4c0f-9a11-c000.snappy.parquet", "train"),
        ("train.parquet/part.3.parquet", "train"),
        ("pictures/split=test/00000000.parquet", "test"),
        ("val2017.parquet", "val2017"),
    ],
)
def test_the_split_is_what_the_name_says(name, split):
    """Names of the hub's files, of single files, and of its converted branches."""
    assert split_of(name) == split


def test_splits_are_found_in_a_folder_its_data_folder_a_glob_and_a_list(tmp_path):
    """Each way to name the same files gives the same splits, in order."""
    table = image_table(*sorted_rows(4))
    train = write_split(tmp_path / "data", "train", table, num_files=2)
    test = write_split(tmp_path / "data", "test", table)
    expected = {"test": [str(test[0])], "train": [str(path) for path in train]}

    assert find_splits(str(tmp_path)) == expected
    assert find_splits(str(tmp_path / "data")) == expected
    assert find_splits(f"{tmp_path}/data/*.parquet") == expected
    assert find_splits(f"{train[1]},{train[0]}") == {"train": expected["train"]}


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    """train_10 comes after train_9."""
    for number in (10, 9, 1):
        pq.write_table(image_table(*sorted_rows(1)), tmp_path / f"train_{number}.parquet")

    (paths,) = find_splits(str(tmp_path)).values()

    assert [path.rsplit("_")[-1] for path in paths] == ["1.parquet", "9.parquet", "10.parquet"]


@pytest.mark.parametrize("part", ["absent.parquet", "absent", "*/absent-*.parquet", "empty"])
def test_every_part_of_a_source_names_files(tmp_path, part):
    """What is missing is named, also next to what is there."""
    (present,) = write_split(tmp_path, "train", image_table(*sorted_rows(1)))
    (tmp_path / "empty").mkdir()

    for source in (f"{tmp_path}/{part}", f"{present},{tmp_path}/{part}"):
        with pytest.raises(UsageError, match=f"{re.escape(part)}: no parquet files"):
            find_splits(source)


def test_a_missing_file_of_a_series_is_an_error(tmp_path):
    """A download that stopped half way is not converted as if it were whole."""
    write_split(tmp_path, "train", image_table(*sorted_rows(6)), num_files=3)[1].unlink()

    with pytest.raises(
        UsageError, match="1 of 3 files are missing, the first is .*/train-00001-of-00003.parquet"
    ):
        find_splits(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["full/train.parquet", "small/train.parquet"],
        ["data/train-00000-of-00001.parquet", "data/train-00001-of-00002.parquet"],
        ["160px/train/0000.parquet", "320px/train/0000.parquet"],
        ["snapshots/0a1b/data/train.parquet", "snapshots/9c8d/data/train.parquet"],
        ["train.parquet", "old/train-0.parquet"],
        ["train-00000-of-00001-aaaaaaaa.parquet", "train-00000-of-00001-bbbbbbbb.parquet"],
        ["pictures/part-00000-aaaa.parquet", "pictures/part-00000-bbbb.parquet"],
        ["train-0.parquet", "train_0.parquet"],
    ],
)
def test_a_split_is_of_one_folder_and_one_series(tmp_path, names):
    """Two revisions, configurations or sizes of a data set are never added together."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    for source in (tmp_path, f"{tmp_path}/**/*.parquet"):
        with pytest.raises(UsageError) as error:
            find_splits(str(source))
        assert all(name.rpartition("-0000")[0] in str(error.value) for name in names)


@given(total=st.integers(1, 12), first=st.integers(0, 1), data=st.data())
def test_a_numbered_series_is_whole_or_refused(tmp_path_factory, total, first, data):
    """Whether it counts from 0 or 1, with or without the hashes of older versions."""
    hashes = data.draw(st.sampled_from(["", "-0a1b2c3d4e5f6789"]))
    numbers = set(range(first, first + total))
    there = data.draw(st.sets(st.sampled_from(sorted(numbers)), min_size=1))
    folder = tmp_path_factory.mktemp("series")
    for i in there:
        (folder / f"train-{i:05d}-of-{total:05d}{hashes}.parquet").touch()

    # From 1 to n - 1 of n may also be 0 to n - 1 without the first: refused, either way.
    if there == numbers:
        assert len(find_splits(str(folder))["train"]) == total
    else:
        with pytest.raises(UsageError, match=f" of {total} files are missing"):
            find_splits(str(folder))


@pytest.mark.parametrize("folder", ["data [v2]", "a[0-9]", "x*y", "{1}"])
def test_a_folder_may_have_any_name(tmp_path, folder):
    """Brackets in a folder that is there are no pattern; hidden files are no data."""
    (path,) = write_split(tmp_path / folder, "train", image_table(*sorted_rows(1)))
    for hidden in ("._train-00000-of-00001.parquet", "_metadata.parquet", "_delta_log/0.parquet"):
        (tmp_path / folder / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / folder / hidden).touch()

    for source in (tmp_path / folder, f"{tmp_path}/{folder}/train-*.parquet", path):
        assert find_splits(str(source)) == {"train": [str(path)]}


@pytest.mark.parametrize("row_group_size", [1, 3, 1000])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "lz4", "brotli"])
def test_any_row_range_has_the_bytes_and_labels_of_its_rows(tmp_path, row_group_size, compression):
    """For tiny and huge row groups, any compression, and ranges across files."""
    images, labels = sorted_rows(10)
    table = image_table(images, labels)
    options = {"row_group_size": row_group_size, "compression": compression}
    paths = write_split(tmp_path, "train", table, num_files=3, **options)
    split = open_split("train", [str(path) for path in paths])

    for start, stop in [(0, 10), (2, 7), (3, 4), (9, 10), (4, 4)]:
        expected = [(row, images[row], labels[row]) for row in range(start, stop)]
        assert rows_of(split, start=start, stop=stop) == expected


def test_empty_files_and_null_rows_are_read_as_such(tmp_path):
    """An empty file has no rows; a null image is an error; such a label is UNLABELLED."""
    images = [encode(0), None, encode(2), encode(3)]
    table = image_table(images, pa.array([0, 1, None, 7]))
    paths = write_split(tmp_path, "train", table)
    pq.write_table(table.slice(0, 0), tmp_path / "train-none.parquet")
    split = open_split("train", [str(tmp_path / "train-none.parquet"), str(paths[0])])

    rows = rows_of(split)

    labels = [0, 1, UNLABELLED, UNLABELLED]
    assert rows == [(i, image, label) for i, (image, label) in enumerate(zip(images, labels))]


@pytest.mark.parametrize("label_type", [pa.uint8(), pa.uint64(), pa.bool_()])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_columns_need_no_metadata(tmp_path, kind, label_type):
    """The only column of bytes holds the images, whatever its name; classes are numbers."""
    images, labels = sorted_rows(5, num_classes=2 if label_type == pa.bool_() else 4)
    table = pa.table(
        {"content": pa.array(images, kind), "label": pa.array(labels).cast(label_type)}
    )
    (path,) = write_split(tmp_path, "train", table)
    split = open_split("train", [str(path)])

    assert find_class_names([split]) == tuple("0123"[: max(labels) + 1])
    assert rows_of(split) == list(zip(range(5), images, labels))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_string_labels_are_numbered_by_sorted_name_over_all_splits(tmp_path, kind):
    """A class that occurs in one split only has the same number in each."""
    splits = []
    for name, labels in (("train", ["cat", "ant", "dog"]), ("test", ["bee", "dog", "ant"])):
        images = [encode(i) for i in range(3)]
        table = image_table(images, pa.array(labels).cast(kind), class_names=None)
        (path,) = write_split(tmp_path, name, table)
        splits.append(open_split(name, [str(path)]))

    names = find_class_names(splits)

    assert names == CLASS_NAMES
    assert [label for _, _, label in rows_of(splits[1], names)] == [1, 3, 0]


def test_columns_that_do_not_fit_are_an_error_that_lists_the_columns(tmp_path):
    """Several candidates, a wrong name, a wrong type: each says what there is."""
    images, labels = sorted_rows(3)
    table = pa.table({"left": images, "right": images, "a": labels, "b": labels})
    (path,) = write_split(tmp_path, "train", table)
    columns = r"columns: left \(binary\), right \(binary\), a \(int64\), b \(int64\)"

    with pytest.raises(UsageError, match=rf"several image columns fit \(left, right\); {columns}"):
        open_split("train", [str(path)])
    with pytest.raises(UsageError, match=f"--image-column lefd is not there; {columns}.*left"):
        open_split("train", [str(path)], image="lefd")
    with pytest.raises(UsageError, match=f"--label-column left is not of a type.*{columns}"):
        open_split("train", [str(path)], image="right", label="left")
    split = open_split("train", [str(path)], image="right", label="b")
    assert split.parts[0].columns.leaves == ["right", "b"]


def columns_of(types: dict, class_labels=()):
    """The columns that are chosen in a file of these columns, all of one image and number."""
    features = {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in class_labels}
    stated = json.dumps({"info": {"features": features}})
    schema = pa.schema(list(types.items()), metadata={"huggingface": stated})
    found = find_columns("a.parquet", schema)
    return found.image, found.label


image_struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("types", "class_labels", "expected"),
    [
        ({"jpg": pa.binary(), "cls": pa.int64(), "__key__": pa.string()}, (), ("jpg", "cls")),
        ({"image": image_struct, "id": pa.int64(), "label": pa.int64()}, (), ("image", "label")),
        ({"image": image_struct, "kind": pa.int64(), "id": pa.int64()}, ("kind",),
         ("image", "kind")),
        ({"img": image_struct, "coarse_label": pa.int64(), "fine_label": pa.int64()},
         ("coarse_label", "fine_label"), ("img", "fine_label")),
        ({"image": image_struct, "Target": pa.string(), "caption": pa.string()}, (),
         ("image", "Target")),
    ],
)  # fmt: skip
def test_columns_are_those_of_the_metadata_or_of_usual_names(types, class_labels, expected):
    """Hugging Face's features first; identifiers and captions next to them do not matter."""
    assert columns_of(types, class_labels) == expected


@pytest.mark.parametrize(
    ("types", "class_labels"),
    [
        ({"image_id": pa.int64(), "labels": pa.list_(pa.int64())}, ()),
        ({"text": pa.string()}, ()),
        ({"__key__": pa.string()}, ()),
        ({"file_name": pa.string(), "width": pa.int64()}, ()),
        ({"source": pa.int64(), "label": pa.int64()}, ("source",)),
        ({"left": pa.int64(), "right": pa.int64()}, ("left", "right")),
    ],
)
def test_a_column_that_may_be_no_label_is_refused(types, class_labels):
    """The candidates are named, and the option that names one of them."""
    with pytest.raises(UsageError, match="--label-column") as error:
        columns_of({"image": image_struct} | types, class_labels)

    assert all(name in str(error.value) for name in types)


@pytest.mark.parametrize("labels", [list("abcdefghij"), list(range(10)), list(range(990, 1000))])
def test_about_as_many_labels_as_rows_are_asked_about(tmp_path, labels):
    """They may be identifiers or captions, unless the user named the column."""
    table = image_table([encode(i) for i in range(10)], labels, class_names=None)
    (path,) = write_split(tmp_path, "train", table)
    split = open_split("train", [str(path)])

    with pytest.raises(UsageError, match="10 different labels in 10 rows.*--label-column"):
        find_class_names([split])
    assert len(find_class_names([split], is_label_named=True)) in (10, 1000)


def test_columns_may_stand_in_any_order_among_others(tmp_path):
    """A label before the image, and columns that nobody asked for."""
    images, labels = sorted_rows(3)
    table = pa.table({"id": ["a", "b", "c"], "label": labels, "image": images, "width": [1, 2, 3]})
    (path,) = write_split(tmp_path, "train", table)

    assert rows_of(open_split("train", [str(path)])) == list(zip(range(3), images, labels))


def test_splits_that_disagree_on_class_names_are_an_error(tmp_path):
    """Label 1 must not mean bee in one split and cat in another."""
    splits = []
    for name, names in (("train", ("ant", "bee")), ("test", ("ant", "cat"))):
        (path,) = write_split(tmp_path, name, image_table([encode(0)], [0], class_names=names))
        splits.append(open_split(name, [str(path)]))

    with pytest.raises(DataError, match="class names differ"):
        find_class_names(splits)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>403</html>", "an HTML page"),
        (b"\x1f\x8b\x08\0rows", "gzip-compressed data"),
    ],
)
def test_what_stands_in_place_of_a_download_is_named(tmp_path, content, what):
    """For parquet files and for tars alike."""
    (tmp_path / "train.parquet").write_bytes(content)
    (tmp_path / "train-000.tar").write_bytes(content + bytes(1024))

    with pytest.raises(DataError, match=f"train.parquet: not a parquet file, but {what}"):
        open_split("train", [str(tmp_path / "train.parquet")])
    with pytest.raises(ShardError, match=f"train-000.tar: not a tar file, but {what}"):
        read_tar(str(tmp_path / "train-000.tar"))


def test_what_is_not_parquet_is_an_error(tmp_path):
    """A cut download is named."""
    (path,) = write_split(tmp_path, "train", image_table(*sorted_rows(5)))
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DataError, match=r"train-00000.*not readable as parquet"):
        open_split("train", [str(path)])
