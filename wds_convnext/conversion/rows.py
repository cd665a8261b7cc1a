"""Rows of parquet files, streamed in flat memory: encoded images without a copy, class numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wds_convnext.conversion.columns import Columns
from wds_convnext.conversion.parquet import UNREADABLE, ParquetPart, ParquetSplit, unreadable

UNLABELLED = -1  # stands for a null, negative or unknown label
_BATCH_BYTES = 2 << 20  # image bytes held at a time
# Rows held at a time: of a dictionary of large values a footer states each but once.
_MAX_BATCH = 128


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows: image bytes (None where null), labels int64 (UNLABELLED where unusable)."""

    first_row: int
    images: list[memoryview | None]
    labels: np.ndarray


def read_rows(
    split: ParquetSplit, class_names: tuple[str, ...], start: int, stop: int
) -> Iterator[RowBatch]:
    """Rows [start, stop) of a split, in order, about 2 MB at a time.

    Raises:
        DataError: if a file has vanished or is damaged.
    """
    for part, part_start in zip(split.parts, split.part_starts):
        first, last = max(start - part_start, 0), min(stop - part_start, part.num_rows)
        if first < last:
            for row, batch in _read_part(part, part.columns.leaves, first, last):
                yield RowBatch(
                    part_start + row,
                    _image_views(batch.column(part.columns.image), part.columns),
                    label_numbers(batch.column(part.columns.label), class_names),
                )


def read_labels(split: ParquetSplit, start: int, stop: int) -> Iterator[pa.Array]:
    """The labels of rows [start, stop) of a split, in batches; dictionaries are decoded."""
    for part, part_start in zip(split.parts, split.part_starts):
        first, last = max(start - part_start, 0), min(stop - part_start, part.num_rows)
        if first < last:
            for _, batch in _read_part(part, [part.columns.label], first, last, batch_size=1 << 16):
                yield _plain(batch.column(part.columns.label))


def _read_part(
    part: ParquetPart, leaves: list[str], first: int, last: int, batch_size: int | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Record batches of rows [first, last) of a file, each with its first row's number."""
    group_starts = [0, *accumulate(part.group_rows)]
    groups = [i for i, begin in enumerate(group_starts[:-1])
              if begin < last and group_starts[i + 1] > first]  # fmt: skip
    row = group_starts[groups[0]]
    if batch_size is None:
        average_bytes = max(1, sum(part.group_bytes) // part.num_rows)
        batch_size = min(max(1, _BATCH_BYTES // average_bytes), _MAX_BATCH)
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


def _image_views(column: pa.Array, columns: Columns) -> list[memoryview | None]:
    """The bytes of each row, without a copy (but for binary views, which are not in one piece)."""
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
    views: list[memoryview | None] = [data[begin:end] for begin, end in zip(offsets, offsets[1:])]
    if array.null_count == 0 and column.null_count == 0:
        return views
    valid = (array.is_valid().to_numpy(False)) & (column.is_valid().to_numpy(False))
    return [view if ok else None for view, ok in zip(views, valid.tolist())]


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def label_numbers(column: pa.Array, class_names: tuple[str, ...]) -> np.ndarray:
    """Labels as class numbers, int64; UNLABELLED where null or not a class."""
    column = _plain(column)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        # Not safe: uint64 beyond int64 becomes negative, which is no class either.
        numbers = column.cast(pa.int64(), safe=False).fill_null(UNLABELLED).to_numpy(False)
    else:
        names = pa.array(class_names, pa.large_string())
        found = pc.index_in(column.cast(pa.large_string()), value_set=names)
        numbers = found.cast(pa.int64()).fill_null(UNLABELLED).to_numpy(False)
    return np.where((numbers < 0) | (numbers >= len(class_names)), UNLABELLED, numbers)
