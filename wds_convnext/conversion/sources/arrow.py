"""Arrow files as `datasets.save_to_disk` writes them: a data set, or a folder of one per split.

Each file is a stream of record batches. Where one begins is noted once, so that any range of rows
is read from there; one batch is in memory at a time (`datasets` writes 100 images in each).
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from wds_convnext.conversion.source import (
    BATCH_BYTES,
    MAX_BATCH,
    Count,
    Labels,
    Opener,
    RowBatch,
    SourceSplit,
)
from wds_convnext.conversion.sources.columns import Columns, find_columns
from wds_convnext.conversion.sources.parquet_part import UNREADABLE, image_views
from wds_convnext.door import base_name, read_json, text
from wds_convnext.errors import DataError, UsageError


@dataclass(frozen=True)
class ArrowPart:
    """One file: where each of its record batches stands, and their rows."""

    path: str
    columns: Columns
    offsets: tuple[int, ...]
    batch_starts: tuple[int, ...]  # the row at which each batch begins, and the number of rows
    num_bytes: int
    digest: str

    @property
    def num_rows(self) -> int:
        return self.batch_starts[-1]


@dataclass(frozen=True, kw_only=True)
class ArrowSplit(SourceSplit):
    """The files of one split, in order; rows are numbered through all of them."""

    parts: tuple[ArrowPart, ...]

    def labels(self, start: int, stop: int) -> Iterator[Labels]:
        for _, batch, columns in self._batches(start, stop):
            yield batch.column(columns.label)

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        for row, batch, columns in self._batches(start, stop):
            size = max(1, batch.column(columns.image).nbytes // len(batch))
            step = min(max(1, BATCH_BYTES // size), MAX_BATCH)
            for first in range(0, len(batch), step):
                some = batch.slice(first, step)
                images = image_views(some.column(columns.image), columns)
                yield RowBatch(row + first, images, some.column(columns.label))

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch, Columns]]:
        """What the record batches hold of rows [start, stop), each with its first row."""
        for part, part_start in zip(self.parts, self.file_starts):
            first, last = max(start - part_start, 0), min(stop - part_start, part.num_rows)
            if first < last:
                for row, batch in _read_part(part, first, last):
                    yield part_start + row, batch, part.columns

    def locate(self, row: int) -> tuple[str, int]:
        part = bisect_right(self.file_starts, row) - 1
        return os.path.basename(self.parts[part].path), row - self.file_starts[part]


def find(source: str, count: Count) -> dict[str, Opener] | None:
    """The splits of a folder that `save_to_disk` wrote, of a Dataset or a DatasetDict.

    Raises:
        UsageError: if a file of it is missing or not what it should be.
    """
    folders: dict[str, str] = {}
    if os.path.isfile(stated := os.path.join(source, "dataset_dict.json")):
        names = _read(stated, {"splits": [base_name]})["splits"]
        folders = {name: os.path.join(source, name) for name in names}
    elif os.path.isfile(stated := os.path.join(source, "state.json")):
        folders = {_read(stated, {"_split?": text}).get("_split") or "train": source}
    splits: dict[str, Opener] = {}
    for name, folder in folders.items():
        state = os.path.join(folder, "state.json")
        files = _read(state, {"_data_files": [{"filename": base_name}]})["_data_files"]
        paths = [os.path.join(folder, file["filename"]) for file in files]
        count(len(paths), 0)
        splits[name] = partial(_open, name, paths, Path(source).absolute().name)
    return splits or None


def _read(path: str, shape: dict) -> dict:
    try:
        return read_json(path, shape)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: not what save_to_disk writes ({reason}).") from None


def _open(
    name: str, paths: list[str], dataset: str, *, image: str | None = None, label: str | None = None
) -> ArrowSplit:
    parts = tuple(_open_part(path, image, label) for path in paths)
    if not parts:
        raise DataError(f"{name}: its state.json lists no files.")
    first = parts[0].columns
    for part in parts:
        if part.columns != first:
            raise DataError(
                f"{part.path}: its columns differ from those of {parts[0].path}: "
                f"{part.columns} here, {first} there."
            )
    facts = [(os.path.basename(part.path), part.digest) for part in parts]
    return ArrowSplit(
        name=name,
        num_rows=sum(part.num_rows for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        dataset=dataset,
        files=tuple(paths),
        columns=(first.image, first.label),
        class_names=first.class_names,
        file_starts=(0, *accumulate(part.num_rows for part in parts)),
        parts=parts,
    )


def _open_part(path: str, image: str | None, label: str | None) -> ArrowPart:
    """Walk over the batches of a file, mapped: their offsets are read, images are not."""
    offsets, rows, num_bytes, digest = [], [0], 0, hashlib.sha256()
    try:
        with pa.memory_map(path) as file, pa.ipc.open_stream(file) as reader:
            columns = find_columns(path, reader.schema, image=image, label=label)
            digest.update(reader.schema.serialize())
            while True:
                offsets.append(file.tell())
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                rows.append(rows[-1] + len(batch))
                num_bytes += batch.column(columns.image).nbytes
                digest.update(b"%d %d %d " % (offsets[-1], len(batch), num_bytes))
                for buffer in batch.column(columns.label).buffers():
                    digest.update(buffer or b"")
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    return ArrowPart(path, columns, tuple(offsets[:-1]), tuple(rows), num_bytes, digest.hexdigest())


def _read_part(part: ArrowPart, first: int, last: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """What the batches hold of rows [first, last) of a file, read without mapping it."""
    try:
        with pa.OSFile(part.path) as file:
            schema = pa.ipc.read_schema(file)
            for offset, start, stop in zip(part.offsets, part.batch_starts, part.batch_starts[1:]):
                if stop > first and start < last:
                    file.seek(offset)
                    batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
                    if len(batch) != stop - start:
                        raise ValueError(f"{len(batch):,} rows where there were {stop - start:,}")
                    begin = max(first - start, 0)
                    yield start + begin, batch.slice(begin, min(last, stop) - start - begin)
    except UNREADABLE as error:
        raise _unreadable(part.path, error) from None


def _unreadable(path: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: not readable as an Arrow stream ({reason}). Write it again.")
