"""Parquet files as nobody should write them: every row that is stated is read, or one line."""

import contextlib
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parquet_sets import image_table, sorted_rows, write_split

from wds_convnext.conversion import convert
from wds_convnext.conversion.sources.parquet import open_split
from wds_convnext.errors import WdsConvnextError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (path,) = write_split(folder, "train", image_table(*sorted_rows(12)), row_group_size=5)
    return path.read_bytes()


@given(data=st.data())
def test_a_flipped_bit_of_a_footer_loses_no_row_silently(whole, tmp_path_factory, data):
    """All rows are read, or the file is refused."""
    footer_bytes = int.from_bytes(whole[-8:-4], "little")
    at = data.draw(st.integers(len(whole) - 8 - footer_bytes, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "train.parquet"
    path.write_bytes(flipped)

    try:
        split = open_split("train", [str(path)], image="image", label="label")
        num_read = sum(len(batch.images) for batch in split.rows(0, split.num_rows))
    except WdsConvnextError as error:
        assert "\n" not in str(error)
    else:
        assert num_read == split.num_rows == 12


def test_a_footer_whose_groups_do_not_add_up_is_refused(whole, tmp_path):
    """Rows that no group holds, or that only a group knows of."""
    path = tmp_path / "train.parquet"
    metadata = pq.read_metadata(pa.BufferReader(whole))
    groups = [metadata.row_group(i).num_rows for i in range(3)]
    assert (metadata.num_rows, groups) == (12, [5, 5, 2])
    # Thrift's compact protocol: field 3 of the footer, an i64, comes after the schema's list.
    at = whole.rindex(b"\x16\x18\x19\x3c")
    path.write_bytes(whole[: at + 1] + b"\x14" + whole[at + 2 :])

    with pytest.raises(WdsConvnextError, match=r"states 10 rows and 12 in groups"):
        open_split("train", [str(path)])


def test_names_that_are_not_text_are_refused(tmp_path):
    """Class names that are not text, or half of a surrogate pair: one line, or left out."""
    table = image_table(*sorted_rows(8))
    for number, names in enumerate((["a", "\ud800"], 7, {"a": 1}, [None])):
        stated = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        forged = table.replace_schema_metadata({"huggingface": json.dumps(stated)})
        folder = tmp_path / str(number)
        write_split(folder, "train", forged)
        with contextlib.suppress(WdsConvnextError):
            convert(str(folder), out=str(tmp_path / "out" / str(number)), jobs=1, quiet=True)


def test_a_name_of_bytes_that_are_no_text_is_one_line(whole, tmp_path):
    """Of a column, of the writer, of the metadata."""
    for number, name in enumerate((b"label", b"parquet-cpp", b"huggingface", b"image")):
        folder = tmp_path / str(number)
        folder.mkdir()
        at = whole.rindex(name)
        (folder / "train.parquet").write_bytes(whole[:at] + b"\xff\xfe" + whole[at + 2 :])
        try:
            convert(str(folder), out=str(tmp_path / "out" / str(number)), jobs=1, quiet=True)
        except WdsConvnextError as error:
            assert str(error).isprintable()


MEASURED = """
from wds_convnext.conversion import convert
from wds_convnext.errors import WdsConvnextError
try:
    convert({source!r}, out={out!r}, jobs=1, quiet=True, shuffle=False)
except WdsConvnextError as error:
    print(error)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.parametrize(
    ("size", "num_rows", "message"),
    [(1 << 18, 3000, "rows are unusable"), (80 << 20, 1, "unpack to 83,886,1")],
)
def test_a_small_file_does_not_fill_the_memory(tmp_path, size, num_rows, message):
    """A dictionary of one large value in many rows; a value of zeros that packs well."""
    image = pa.DictionaryArray.from_arrays([0] * num_rows, pa.array([bytes(size)]))
    labels = pa.array([i % 4 for i in range(num_rows)])
    path = tmp_path / "train.parquet"
    table = pa.table({"image": image, "label": labels})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 100_000

    code = MEASURED.format(source=str(tmp_path), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    found, peak_kb = done.stdout.splitlines()
    assert message in found
    assert int(peak_kb) < 400_000


DYING = """
import os
import wds_convnext.conversion
wds_convnext.conversion.open_splits = lambda *args, **options: os.abort()
if __name__ == "__main__":
    from wds_convnext.cli import main
    main(["shards", {source!r}, "--out", {out!r}, "--jobs", "2"])
"""


def test_a_file_that_ends_the_process_that_reads_it_is_one_line(tmp_path):
    """As pyarrow does on some damage: the command lives on, and says so."""
    script = tmp_path / "dying.py"
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    script.write_text(DYING.format(source=str(tmp_path), out=str(tmp_path / "out")))

    done = subprocess.run([sys.executable, script], capture_output=True, text=True)

    assert done.returncode == 2
    assert "a worker process was killed (out of memory, or by a damaged file?)" in done.stderr
    assert "Traceback" not in done.stderr
