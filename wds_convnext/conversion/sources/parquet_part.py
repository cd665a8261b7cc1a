"""One parquet file: what its footer says of it, and its rows in flat memory.

Encoded images come without a copy, labels as they are stored.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wds_convnext.conversion.source import BATCH_BYTES, MAX_BATCH
from wds_convnext.conversion.sources.columns import Columns, find_columns
from wds_convnext.errors import DataError
from wds_convnext.shards.sniff import sniff

# What pyarrow raises on damaged files. Names in a footer need not be text.
UNREADABLE = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError)
_MUCH, _MAX_RATIO = 1 << 26, 200  # bytes; how much smaller encoded images can be packed

_NO_IMAGE = "its image is null"
_NO_BYTES = "its image is null, or a path without bytes: write the files' bytes into the column"


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file: rows and encoded image bytes of each of its row groups."""

    path: str
    columns: Columns
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    footer_sha256: str
    holds_paths: bool = False  # in place of encoded images

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)


def open_part(path: str, *, image: str | None = None, label: str | None = None) -> ParquetPart:
    """Read the footer of a file, and find its image and label columns.

    Raises:
        DataError: if the file is not parquet, is cut short, or does not add up.
        UsageError: if it is not clear which columns are meant.
    """
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
    has_path = columns.image_is_struct and f"{columns.image}.path" in leaves
    holds_paths = columns.image_is_path or (has_path and all(map(_is_null, chunks)))
    return ParquetPart(path, columns, group_rows, group_bytes, footer, holds_paths)


def _is_null(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether every value of a column in a row group is null, as its statistics say."""
    return chunk.is_stats_set and chunk.statistics.null_count == chunk.num_values


def unreadable(path: str, error: Exception | str) -> DataError:
    """The error to raise for a parquet file that cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(64)
        if not head.startswith(b"PAR1") and (other := sniff(head)):
            return DataError(f"{path}: not a parquet file, but {other[0]}. {other[1]}.")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: not readable as parquet ({reason}). Download it again.")


def read_part(
    part: ParquetPart, leaves: list[str], first: int, last: int, batch_size: int | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Record batches of rows [first, last) of a file, each with its first row's number."""
    group_starts = [0, *accumulate(part.group_rows)]
    groups = [i for i, begin in enumerate(group_starts[:-1])
              if begin < last and group_starts[i + 1] > first]  # fmt: skip
    row = group_starts[groups[0]]
    if batch_size is None:
        average_bytes = max(1, sum(part.group_bytes) // part.num_rows)
        batch_size = min(max(1, BATCH_BYTES // average_bytes), MAX_BATCH)
    try:
        # A buffered stream and no pre-buffering: otherwise a whole row group is held at once.
        with pq.ParquetFile(part.path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size, groups, leaves, use_threads=False):
                begin, end = max(first - row, 0), min(last - row, len(batch))
                if begin < end:
                    yield row + begin, batch.slice(begin, end - begin)
                row += len(batch)
    except UNREADABLE as error:
        raise unreadable(part.path, error) from None
    stop = group_starts[groups[-1] + 1]
    if row != stop:
        raise unreadable(part.path, f"it has {row:,} rows where its footer states {stop:,}")


def image_views(column: pa.Array, columns: Columns) -> list[memoryview | DataError]:
    """The bytes of each row, without a copy (but for binary views, which are not in one piece).

    A row whose image is null has a DataError in place of bytes.
    """
    array = column.field("bytes") if columns.image_is_struct else column
    if pa.types.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    if len(array) == 0:
        return []
    width = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    _, offset_buffer, data_buffer = array.buffers()
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(offset_buffer, dtype=width)[window].tolist()
    data = memoryview(data_buffer or b"").cast("B")  # pyarrow's own view is of signed bytes
    views: list[memoryview | DataError] = [
        data[begin:end] for begin, end in zip(offsets, offsets[1:])
    ]
    if array.null_count == 0 and column.null_count == 0:
        return views
    valid = (array.is_valid().to_numpy(False)) & (column.is_valid().to_numpy(False))
    reason = _NO_BYTES if columns.image_is_struct else _NO_IMAGE
    return [view if ok else DataError(reason) for view, ok in zip(views, valid.tolist())]
