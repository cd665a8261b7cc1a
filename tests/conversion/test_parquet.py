"""Splits, columns, classes and rows are found in parquet files as they exist in the world."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_sets import CLASS_NAMES, encode, image_table, sorted_rows, write_split

from wds_convnext.conversion.parquet import find_splits, open_split, split_of
from wds_convnext.conversion.rows import UNLABELLED, find_class_names, read_rows
from wds_convnext.errors import DataError, UsageError


def rows_of(split, class_names=CLASS_NAMES, start=0, stop=None):
    batches = read_rows(split, class_names, start, split.num_rows if stop is None else stop)
    return [
        (batch.first_row + i, image if image is None else bytes(image), int(label))
        for batch in batches
        for i, (image, label) in enumerate(zip(batch.images, batch.labels, strict=True))
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


def test_a_missing_source_names_both_remedies(tmp_path):
    """The message says how to download the data, and how to do without."""
    with pytest.raises(UsageError, match=r"no parquet files.*make data.*make demo"):
        find_splits(str(tmp_path / "absent"))


def test_a_missing_file_of_a_series_is_an_error(tmp_path):
    """A download that stopped half way is not converted as if it were whole."""
    write_split(tmp_path, "train", image_table(*sorted_rows(6)), num_files=3)[1].unlink()

    with pytest.raises(UsageError, match="1 of 3 files are missing, the first is number 00001"):
        find_splits(str(tmp_path))


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
    """An empty file has no rows; a null image is None; a null or unknown label is UNLABELLED."""
    images = [encode(0), None, encode(2), encode(3)]
    table = image_table(images, pa.array([0, 1, None, 7]))
    paths = write_split(tmp_path, "train", table)
    pq.write_table(table.slice(0, 0), tmp_path / "train-none.parquet")
    split = open_split("train", [str(tmp_path / "train-none.parquet"), str(paths[0])])

    rows = rows_of(split)

    labels = [0, 1, UNLABELLED, UNLABELLED]
    assert rows == [(i, image, label) for i, (image, label) in enumerate(zip(images, labels))]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_columns_of_any_name_are_found_by_type(tmp_path, kind):
    """Without metadata, the only binary column is the image, the only integer one the label."""
    images, labels = sorted_rows(5)
    table = pa.table({"content": pa.array(images, kind), "kind": pa.array(labels, pa.uint8())})
    (path,) = write_split(tmp_path, "train", table)
    split = open_split("train", [str(path)])

    assert find_class_names([split]) == ("0", "1", "2", "3")
    assert rows_of(split) == list(zip(range(5), images, labels))


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
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

    with pytest.raises(UsageError, match=f"several image columns fit; {columns}"):
        open_split("train", [str(path)])
    with pytest.raises(UsageError, match=f"--image-column lefd is not there; {columns}.*left"):
        open_split("train", [str(path)], image="lefd")
    with pytest.raises(UsageError, match=f"--label-column left is not of a type.*{columns}"):
        open_split("train", [str(path)], image="right", label="left")
    split = open_split("train", [str(path)], image="right", label="b")
    assert split.parts[0].columns.leaves == ["right", "b"]


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


def test_what_is_not_parquet_is_an_error(tmp_path):
    """A cut download is named."""
    (path,) = write_split(tmp_path, "train", image_table(*sorted_rows(5)))
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DataError, match=r"train-00000.*not readable as parquet"):
        open_split("train", [str(path)])
