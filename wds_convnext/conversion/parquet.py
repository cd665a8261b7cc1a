"""The parquet files of a split, as their footers describe them.

`sources` finds the files of each split, `columns` where images and labels stand in them.
"""

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from wds_convnext.conversion.columns import Columns, find_columns
from wds_convnext.errors import DataError
from wds_convnext.shards.classes import class_difference
from wds_convnext.shards.sniff import sniff

# What pyarrow raises on damaged files. Names in a footer need not be text.
UNREADABLE = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError)
_MUCH, _MAX_RATIO = 1 << 26, 200  # bytes; how much smaller encoded images can be packed


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file: rows and encoded image bytes of each of its row groups."""

    path: str
    columns: Columns
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    footer_sha256: str

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True)
class ParquetSplit:
    """The files of one split, in order; rows are numbered through all of them."""

    name: str
    parts: tuple[ParquetPart, ...]

    @cached_property
    def part_starts(self) -> list[int]:
        """The row at which each part starts, and after the last one the number of rows."""
        return [0, *accumulate(part.num_rows for part in self.parts)]

    @cached_property
    def group_starts(self) -> list[int]:
        """The row at which each row group starts, and after the last one the number of rows."""
        return [0, *accumulate(rows for part in self.parts for rows in part.group_rows)]

    @property
    def num_rows(self) -> int:
        return self.part_starts[-1]

    @cached_property
    def num_bytes(self) -> int:
        """The image bytes, as the footers state them."""
        return sum(sum(part.group_bytes) for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """Identifies the input: the names and footers (statistics, offsets) of its files."""
        facts = [(os.path.basename(part.path), part.footer_sha256) for part in self.parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def locate(self, row: int) -> tuple[str, int]:
        """The file that holds a row, and the row's number in it."""
        part = bisect_right(self.part_starts, row) - 1
        return self.parts[part].path, row - self.part_starts[part]


def open_split(
    name: str, paths: list[str], *, image: str | None = None, label: str | None = None
) -> ParquetSplit:
    """Read the footers of a split's files, and find their image and label columns.

    Raises:
        DataError: if a file is not parquet, is cut short, or differs from the others.
        UsageError: if it is not clear which columns are meant.
    """
    parts = tuple(_open_part(path, image, label) for path in paths)
    first = parts[0].columns
    for part in parts:
        if part.columns != first:
            names, others = part.columns.class_names or (), first.class_names or ()
            difference = class_difference(names, others) or f"{part.columns} here, {first} there"
            raise DataError(
                f"{part.path}: its columns or class names differ from those of {parts[0].path}: "
                f"{difference}. Convert them into separate folders."
            )
    return ParquetSplit(name, parts)


def _open_part(path: str, image: str | None, label: str | None) -> ParquetPart:
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            footer_bytes = int.from_bytes(file.read(4), "little")
            file.seek(-8 - footer_bytes, os.SEEK_END)
            footer = hashlib.sha256(file.read()).hexdigest()
        columns = find_columns(path, schema, image=image, label=label)
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        leaf = leaves.index(columns.leaves[0])
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        group_rows = tuple(group.num_rows for group in groups)
        chunks = [group.column(leaf) for group in groups]
        group_bytes = tuple(chunk.total_uncompressed_size for chunk in chunks)
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    if min(group_rows, default=0) < 0 or sum(group_rows) != metadata.num_rows:
        raise unreadable(
            path, f"its footer states {metadata.num_rows:,} rows and {sum(group_rows):,} in groups"
        )
    for chunk in chunks:
        if chunk.total_uncompressed_size > _MUCH + _MAX_RATIO * chunk.total_compressed_size:
            raise unreadable(
                path,
                f"{chunk.total_compressed_size:,} bytes of images unpack to "
                f"{chunk.total_uncompressed_size:,}, as no encoded images do",
            )
    return ParquetPart(path, columns, group_rows, group_bytes, footer)


def unreadable(path: str, error: Exception | str) -> DataError:
    """The error to raise for a parquet file that cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(64)
        if not head.startswith(b"PAR1") and (other := sniff(head)):
            return DataError(f"{path}: not a parquet file, but {other[0]}. {other[1]}.")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: not readable as parquet ({reason}). Download it again.")
