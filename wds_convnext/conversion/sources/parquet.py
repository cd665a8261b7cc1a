"""Parquet files of images and labels, as Hugging Face, pandas, polars and Spark write them.

`parquet_files` finds the files of each split, `columns` where images and labels stand in them.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from wds_convnext.conversion.source import Count, Opener, RowBatch, SourceSplit
from wds_convnext.conversion.sources.images import FileSplit, file_split
from wds_convnext.conversion.sources.parquet_files import find_splits, names_parquet
from wds_convnext.conversion.sources.parquet_part import (
    ParquetPart,
    image_views,
    open_part,
    read_part,
)
from wds_convnext.errors import DataError
from wds_convnext.shards.classes import class_difference


def find(source: str, count: Count) -> dict[str, Opener] | None:
    """The splits of the parquet files that a source names, see `parquet_files.find_splits`."""
    if not names_parquet(source):
        return None
    splits = find_splits(source)
    count(sum(map(len, splits.values())), 0)
    return {name: partial(open_split, name, paths) for name, paths in splits.items()}


@dataclass(frozen=True, kw_only=True)
class ParquetSplit(SourceSplit):
    """The files of one split, in order; rows are numbered through all of them."""

    parts: tuple[ParquetPart, ...]

    def labels(self, start: int, stop: int) -> Iterator[pa.Array]:
        for part, _, first, last in self._ranges(start, stop):
            label = part.columns.label
            for _, batch in read_part(part, [label], first, last, batch_size=1 << 16):
                yield batch.column(label)

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        for part, part_start, first, last in self._ranges(start, stop):
            columns = part.columns
            for row, batch in read_part(part, columns.leaves, first, last):
                images = image_views(batch.column(columns.image), columns)
                yield RowBatch(part_start + row, images, batch.column(columns.label))

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[ParquetPart, int, int, int]]:
        """The files that hold rows [start, stop): each with its first row, and the range in it."""
        for part, part_start in zip(self.parts, self.file_starts):
            first, last = max(start - part_start, 0), min(stop - part_start, part.num_rows)
            if first < last:
                yield part, part_start, first, last

    def locate(self, row: int) -> tuple[str, int]:
        part = bisect_right(self.file_starts, row) - 1
        return os.path.basename(self.parts[part].path), row - self.file_starts[part]


def open_split(
    name: str, paths: list[str], *, image: str | None = None, label: str | None = None
) -> ParquetSplit | FileSplit:
    """Read the footers of a split's files, and find their image and label columns.

    Where the images' column holds paths, the rows are those files.

    Raises:
        DataError: if a file is not parquet, is cut short, or differs from the others.
        UsageError: if it is not clear which columns are meant.
    """
    parts = tuple(open_part(path, image=image, label=label) for path in paths)
    first = parts[0].columns
    for part in parts:
        if part.columns != first:
            names, others = part.columns.class_names or (), first.class_names or ()
            difference = class_difference(names, others) or f"{part.columns} here, {first} there"
            raise DataError(
                f"{part.path}: its columns or class names differ from those of {parts[0].path}: "
                f"{difference}. Convert them into separate folders."
            )
    # The names and footers (statistics, offsets) of the files identify the input.
    facts = [(os.path.basename(part.path), part.footer_sha256) for part in parts]
    folder = Path(paths[0]).absolute().parent
    dataset = (folder.parent if folder.name == "data" else folder).name
    columns = (first.image, first.label)
    if parts and all(part.holds_paths for part in parts if part.num_rows):
        split = file_split(_paths_and_labels(parts), folder=os.path.dirname(paths[0]), name=name)
        return replace(
            split,
            dataset=dataset,
            files=tuple(paths),
            columns=columns,
            class_names=first.class_names,
        )
    return ParquetSplit(
        name=name,
        num_rows=sum(part.num_rows for part in parts),
        num_bytes=sum(sum(part.group_bytes) for part in parts),
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        dataset=dataset,
        files=tuple(paths),
        columns=columns,
        class_names=first.class_names,
        file_starts=(0, *accumulate(part.num_rows for part in parts)),
        read_starts=(0, *accumulate(rows for part in parts for rows in part.group_rows)),
        parts=parts,
    )


def _paths_and_labels(parts: Iterable[ParquetPart]) -> Iterator[tuple[pa.Array, pa.Array]]:
    """The paths and the labels of all rows, in chunks."""
    for part in parts:
        columns = part.columns
        leaf = f"{columns.image}.path" if columns.image_is_struct else columns.image
        if part.num_rows:
            leaves = [leaf, columns.label]
            for _, batch in read_part(part, leaves, 0, part.num_rows, batch_size=1 << 16):
                paths = batch.column(columns.image)
                paths = paths.field("path") if columns.image_is_struct else paths
                yield paths, batch.column(columns.label)
