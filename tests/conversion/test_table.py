"""Tables of paths and labels, as people and tools write them, are converted row by row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_folder import found, shards_of, write_images

from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import read_manifest

ROWS = [("a/1.jpg", "cat"), ("b, c/2.jpg", "dog"), ("3.png", "cat")]


@pytest.fixture
def folder(tmp_path):
    """The images of ROWS; tables are written next to them."""
    write_images(tmp_path / "in", *(path for path, _ in ROWS))
    return tmp_path / "in"


def expected(folder, rows=ROWS):
    return [(label, (folder / path).read_bytes()) for path, label in rows]


def struct_of_paths(rows):
    """What `load_dataset("imagefolder")` and `to_parquet` leave: paths without bytes."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": None, "path": path} for path, _ in rows], kind)


LINES = "".join(f'"{path}",{label}\n' for path, label in ROWS)
TABLES = {
    "plain.csv": "file_name,label\n" + LINES,
    "bom.csv": "\ufefffile_name,label\r\n" + LINES.replace("\n", "\r\n"),
    "no_header.csv": LINES,
    "spaces.csv": "file_name, label\n" + LINES.replace(",c", ", c").replace(",d", " , d"),
    "excel.csv": "path;kind\n" + LINES.replace('",', '";'),
    "tabs.tsv": "id\tpath\tclass\n" + "".join(f"{p}x\t{p}\t{c}\n" for p, c in ROWS),
    "by_content.csv": 'text,where,y\n"two\nlines",' + '\n"",'.join(LINES.splitlines()) + "\n",
    "rows.jsonl": "".join(
        json.dumps({"file_name": p, "label": c, "boxes": [[1, 2]]}) + "\n" for p, c in ROWS
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_come_in_their_order_with_their_labels(folder, tmp_path, name):
    """Columns are found by name and type; paths are relative to the table."""
    (folder / name).write_text(TABLES[name], newline="")

    shards_of(folder / name, tmp_path / "out")

    assert found(tmp_path / "out") == expected(folder)
    assert not verify(
        str(tmp_path / "out"), against=str(folder / name), jobs=1, quiet=True
    ).problems


@pytest.mark.parametrize("kind", ["text", "struct", "absolute"])
def test_parquet_files_of_paths_are_followed(folder, tmp_path, kind):
    """Text, or Hugging Face's struct without bytes; class names come from the metadata."""
    rows = [(str(folder / path) if kind == "absolute" else path, c) for path, c in ROWS]
    paths = pa.array([path for path, _ in rows]) if kind == "text" else struct_of_paths(rows)
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
    }
    table = pa.table({"image": paths, "label": [0, 1, 0]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, folder / "train.parquet")

    shards_of(folder / "train.parquet", tmp_path / "out")

    assert found(tmp_path / "out") == expected(folder)
    against = str(folder / "train.parquet")
    assert not verify(str(tmp_path / "out"), against=against, jobs=1, quiet=True).problems


def test_numbers_are_class_numbers_and_missing_labels_are_bad_rows(folder, tmp_path):
    """As pandas writes a column of integers with holes."""
    labels = ["2.0", "", "0.0"]
    lines = "".join(f'"{path}",{label}\n' for (path, _), label in zip(ROWS, labels))
    (folder / "a.csv").write_text("image,label\n" + lines)

    shards_of(folder / "a.csv", tmp_path / "out", on_bad="skip")

    assert read_manifest(tmp_path / "out/train.json").class_names == ("0", "1", "2")
    rows = [(ROWS[0][0], "2"), (ROWS[2][0], "0")]
    assert found(tmp_path / "out") == expected(folder, rows)
    assert "its label is null" in (tmp_path / "out/train.bad.jsonl").read_text()


def test_missing_files_are_listed_and_left_out_on_request(folder, tmp_path):
    """By their paths."""
    lines = "gone/9.jpg,cat\n,cat\nhttps://example.org/1.jpg,cat\n" + LINES
    (folder / "a.csv").write_text("image,label\n" + lines)

    with pytest.raises(DataError, match=r"3 of 6 rows .* gone/9.jpg: cannot be read \(No such"):
        shards_of(folder / "a.csv", tmp_path / "out")
    shards_of(folder / "a.csv", tmp_path / "out", on_bad="skip")

    assert found(tmp_path / "out") == expected(folder)
    listed = (tmp_path / "out/train.bad.jsonl").read_text().splitlines()
    assert ["path" in listed[1], "a URL" in listed[2]] == [True, True]


def test_a_column_of_splits_makes_splits(folder, tmp_path):
    """So that no test image is trained on."""
    lines = [
        f'"{path}",{label},{s}\n' for (path, label), s in zip(ROWS, ["train", "test", "train"])
    ]
    (folder / "all.csv").write_text("image,label,split\n" + "".join(lines))

    shards_of(folder / "all.csv", tmp_path / "out")

    assert found(tmp_path / "out") == expected(folder, [ROWS[0], ROWS[2]])
    assert found(tmp_path / "out", "test") == expected(folder, [ROWS[1]])


def test_a_folder_of_tables_has_a_split_for_each(folder, tmp_path):
    """`train.csv` and `test.csv` next to one folder of images."""
    for split, (path, label) in (("train", ROWS[0]), ("test", ("a/2.jpg", "dog"))):
        write_images(folder, path)
        (folder / f"{split}.csv").write_text(f"image,label\n{path},{label}\n")
    (folder / "b, c" / "2.jpg").unlink()

    shards_of(folder, tmp_path / "out")

    assert found(tmp_path / "out") == expected(folder, ROWS[:1])
    assert found(tmp_path / "out", "test") == expected(folder, [("a/2.jpg", "dog")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: not readable as CSV"),
        ("a.csv", b"image,label\n", "a.csv: it has no rows"),
        ("a.csv", b"image,label\na.jpg,1,2\n", "not readable as CSV .*Expected 2 columns, got 3"),
        ("a.csv", "image,label\na.jpg,ö\n".encode("latin-1"), "not readable as CSV .*UTF8"),
        ("a.csv", "image,label\n".encode("utf-16"), "its text is UTF-16. Save it as UTF-8"),
        ("a.csv", b"x,label\n1,2\n", r"no image column; columns: x \(string\), label"),
        ("a.csv", b"image,x,z\na.jpg,1,2\n", "several label columns fit .x, z.*--label-column"),
        ("a.csv", b"image,label\na.jpg,99999999999\n", "a label of 99,999,999,999"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl: not readable as JSON lines"),
        ("a.jsonl", b'{"image": "a.jpg", "label": 1}\n{"image": "b.jpg", "label": "x"}\n',
         "a.jsonl: not readable as JSON lines"),
        ("a.gz", b"\x1f\x8b", "a.gz: gzip-compressed data. Expected"),
    ],
)  # fmt: skip
def test_what_is_no_such_table_is_one_line(tmp_path, name, content, message):
    """What was found, where, and what would help."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises((DataError, UsageError), match=message):
        shards_of(tmp_path / name, tmp_path / "out")
