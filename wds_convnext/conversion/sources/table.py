"""Tables of paths and labels: CSV, TSV and JSON lines.

Paths are relative to the table's file, or absolute. The split is that of a column called split or
subset, if there is one, else of the file's name (`val.csv`), else train.
"""

import csv
import io
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from wds_convnext.conversion.source import Count, Opener
from wds_convnext.conversion.sources.columns import find_columns
from wds_convnext.conversion.sources.images import (
    FileSplit,
    file_split,
    has_image_suffix,
    is_visible,
)
from wds_convnext.door import read_head
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.naming import find_files, purpose

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_SPLIT_COLUMNS = ("split", "subset")


def find(source: str, count: Count) -> dict[str, Opener] | None:
    """The splits of the tables that a source names: files, or a folder that holds some.

    Raises:
        UsageError: if two tables have the same split, or one cannot be read.
    """
    splits: dict[str, Opener] = {}
    owners: dict[str, str] = {}
    for path in tables_of(source):
        count(1, 0)
        for name, value in _splits_of(path).items():
            if (other := owners.setdefault(name, path)) != path:
                raise UsageError(f"{other} and {path}: both have the split {name}. Name one.")
            splits[name] = partial(_open, name, path, value)
    return splits or None


def tables_of(source: str) -> list[str]:
    """The tables that a source names; of a folder those named after a split, or the only one."""
    if not os.path.isdir(source):
        parts = [source] if os.path.exists(source) else source.split(",")
        paths = [path for part in map(str.strip, parts) for path in find_files(part)]
        return [path for path in paths if path.lower().endswith(_SUFFIXES)]
    names = sorted(filter(is_visible, os.listdir(source)))
    names = [name for name in names if name.lower().endswith(_SUFFIXES)]
    named = [name for name in names if purpose(Path(name).stem.lower())]
    return [os.path.join(source, name) for name in named or names[: len(names) == 1]]


def _splits_of(path: str) -> dict[str, str | None]:
    """The splits of a table, each with its value in the column of splits, None without one."""
    schema = _Reader(path).schema
    for column in _SPLIT_COLUMNS:
        if column in schema.names:
            values = {
                value for batch in _Reader(path).read([column]) for value in batch[0].to_pylist()
            }
            if values and all(isinstance(v, str) and purpose(v.lower()) for v in values):
                return {re.sub(r"[^\w-]", "_", value): value for value in sorted(values)}
    stem = re.sub(r"[^\w-]", "_", Path(path).stem)
    return {stem if purpose(stem.lower()) else "train": None}


def _open(
    name: str, path: str, value: str | None, *, image: str | None = None, label: str | None = None
) -> FileSplit:
    reader = _Reader(path)
    if reader.head is None:
        raise DataError(f"{path}: it has no rows.")
    named = zip(reader.schema.names, reader.head.columns)
    paths = [name for name, values in named if _are_paths(values)]
    columns = find_columns(path, reader.schema, image=image, label=label, paths=paths)
    split_column = next((c for c in _SPLIT_COLUMNS if c in reader.schema.names), None)

    def chunks() -> Iterator[tuple[pa.Array, pa.Array]]:
        wanted = [columns.image, columns.label]
        if split_column is not None and value is not None:
            wanted.append(split_column)
        for batch in reader.read(wanted):
            if len(wanted) == 3:
                batch = batch.filter(pc.equal(batch[2], value))
            yield batch[0], batch[1]

    split = file_split(
        chunks(), folder=os.path.dirname(path), name=name, numbers_are_text=not reader.is_json
    )
    return replace(
        split,
        dataset=Path(path).absolute().parent.name,
        files=(path,),
        columns=(columns.image, columns.label),
    )


def _are_paths(column: pa.Array) -> bool:
    """Whether most values of a column name image files."""
    if not pa.types.is_string(column.type):
        return False
    values = column.drop_null().slice(0, 100).to_pylist()
    return sum(map(has_image_suffix, values)) * 2 > len(values)


def _trimmed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same texts without spaces around them, as after a comma."""
    columns = [pc.utf8_trim_whitespace(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


class _Reader:
    """A CSV, TSV or JSON lines file, read in batches of columns; CSV's values are all text.

    Attributes:
        schema: all columns.
        head: the first rows, of all columns.

    Raises:
        UsageError: if the file is UTF-16.
        DataError: here and in `read`, if it is not such a table.
    """

    def __init__(self, path: str):
        self.path = path
        self.is_json = path.lower().endswith((".jsonl", ".ndjson"))
        start = read_head(path, 1 << 16)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UsageError(f"{path}: its text is UTF-16. Save it as UTF-8.")
        if not self.is_json:
            self._read_header(start.decode("utf-8-sig", errors="replace"))
            self.schema = pa.schema([(name, pa.string()) for name in self._names])
        self.head = next(self.read(None), None)
        if self.is_json and self.head is not None:
            self.schema = self.head.schema

    def _read_header(self, text: str) -> None:
        """The delimiter and the names of the columns; without a header they are f0, f1, …"""
        line = text.split("\n", 1)[0]
        self._delimiter = max("\t,;", key=line.count)
        names = next(csv.reader(io.StringIO(text), delimiter=self._delimiter), [])
        first = [name.strip() for name in names]
        self._has_header = not any(map(has_image_suffix, first))
        self._names = first if self._has_header else [f"f{i}" for i in range(len(first))]

    def read(self, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        """Batches of some columns, in their order; of all columns, if None."""
        try:
            with self._open(columns) as batches:
                yield from batches if self.is_json else map(_trimmed, batches)
        except (pa.ArrowException, OSError, ValueError) as error:
            kind = "JSON lines" if self.is_json else "CSV"
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.path}: not readable as {kind} ({reason}).") from None

    def _open(self, columns: list[str] | None) -> Any:
        if self.is_json:
            schema = columns and pa.schema([self.schema.field(name) for name in columns])
            unexpected = "ignore" if columns else "infer"
            options = pyarrow.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior=unexpected
            )
            return pyarrow.json.open_json(self.path, parse_options=options)
        return pyarrow.csv.open_csv(
            self.path,
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, column_names=self._names, skip_rows=int(self._has_header)
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=self._delimiter, newlines_in_values=True
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns or self._names,
                column_types=dict.fromkeys(self._names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
