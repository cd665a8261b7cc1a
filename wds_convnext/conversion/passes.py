"""The passes of a conversion, as tasks: values that any process can run, in any order.

A task writes one file at `path` and returns its record; the same task writes the same bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from wds_convnext.conversion.records import recorded
from wds_convnext.conversion.scatter import Scatter, ranks_in_class
from wds_convnext.conversion.shrink import AS_STORED, Shrink, Shrunk, digest_image
from wds_convnext.conversion.source import UNLABELLED, SourceSplit, label_numbers, read_rows
from wds_convnext.conversion.spill import SpillWriter, read_spilled
from wds_convnext.conversion.tarwriter import ShardWriter
from wds_convnext.errors import DataError
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.image import ImageSurvey, inspect_image

NO_LABEL = "its label is null or not a class"
Count = Callable[[int, int], None]


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a split, without the excluded ones."""

    split: SourceSplit
    class_names: tuple[str, ...]
    start: int
    stop: int
    decode: bool
    excluded: frozenset[int] = frozenset()
    shrink: Shrink | None = None


@dataclass
class Findings:
    """What was found in rows while they passed; `bad` holds (row, reason)."""

    survey: ImageSurvey = field(default_factory=ImageSurvey)
    bad: list[tuple[int, str]] = field(default_factory=list)
    shrunk: Shrunk = Shrunk()

    def record(self) -> dict:
        return {"survey": self.survey.to_json(), "bad": self.bad, "shrunk": self.shrunk}


class UsableRow(NamedTuple):
    """What becomes a sample. `source` is the digest of an image that was shrunk, or AS_STORED."""

    row: int
    image: bytes | memoryview
    label: int
    extension: str
    source: int


def usable_rows(rows: Rows, findings: Findings, count: Count) -> Iterator[UsableRow]:
    """The usable rows of a range; the others go to `findings`."""
    for batch in read_rows(rows.split, rows.start, rows.stop):
        num_bytes = 0
        labels = label_numbers(batch.labels, rows.class_names).tolist()
        for row, (image, label) in enumerate(zip(batch.images, labels), start=batch.first_row):
            if row in rows.excluded:
                continue
            try:
                if label == UNLABELLED:
                    raise DataError(NO_LABEL)
                if isinstance(image, DataError):
                    raise image
                facts = inspect_image(image)
                smaller = rows.shrink.apply(image, facts) if rows.shrink else None
                if rows.decode and smaller is None:
                    decode_rgb(bytes(image))  # as training will
            except DataError as error:
                findings.bad.append((row, str(error)))
                continue
            findings.survey.add(facts)
            num_bytes += len(image)
            if smaller is None:
                yield UsableRow(row, image, label, facts.extension, AS_STORED)
            else:
                findings.shrunk = findings.shrunk.plus((1, len(image), len(smaller)))
                yield UsableRow(row, smaller, label, "jpg", digest_image(image))
        count(len(batch.images), num_bytes)


@dataclass(frozen=True)
class CopyRows:
    """Stored order: a range of rows becomes a shard."""

    rows: Rows
    path: str
    sidecar_path: str
    records_path: str

    def run(self, count: Count) -> dict:
        findings = Findings()
        with _writer(self) as writer:
            for row, image, label, extension, source in usable_rows(self.rows, findings, count):
                key = f"{self.rows.split.key(row):09d}"
                writer.write(key, image, extension=extension, label=label, source=source)
        return writer.record() | findings.record()


@dataclass(frozen=True)
class CountLabels:
    """Shuffled, first pass: how many usable rows of each class a range has."""

    rows: Rows
    path: str

    def run(self, count: Count) -> dict:
        labels = usable_labels(self.rows)
        count(len(labels), 0)
        counts = np.bincount(labels[labels != UNLABELLED], minlength=len(self.rows.class_names))
        return {"class_counts": counts.tolist()}


def usable_labels(rows: Rows) -> np.ndarray:
    """The class number of each row, int64; UNLABELLED where it is unusable or excluded."""
    chunks = rows.split.labels(rows.start, rows.stop)
    labels = np.concatenate([label_numbers(chunk, rows.class_names) for chunk in chunks])
    if len(labels) != rows.stop - rows.start:
        raise DataError(
            f"{len(labels)} labels of {rows.split.name} for {rows.stop - rows.start} rows."
        )
    labels[[row - rows.start for row in rows.excluded if rows.start <= row < rows.stop]] = (
        UNLABELLED
    )
    return labels


@dataclass(frozen=True)
class SpillRows:
    """Shuffled, second pass: a range of rows goes to a spill file, each row with its place."""

    rows: Rows
    path: str
    scatter: Scatter
    counts_before: np.ndarray  # usable rows of each class before the range

    def run(self, count: Count) -> dict:
        labels = usable_labels(self.rows)
        usable = np.flatnonzero(labels != UNLABELLED)
        ranks = ranks_in_class(labels[usable], self.counts_before)
        destinations = np.zeros((2, len(labels)), dtype=np.int64)
        destinations[:, usable] = self.scatter.destination(labels[usable], ranks)
        shards, places = destinations.tolist()
        findings = Findings()
        with SpillWriter(self.path) as writer:
            for row, image, label, extension, source in usable_rows(self.rows, findings, count):
                writer.write(
                    image,
                    shard=shards[row - self.rows.start],
                    place=places[row - self.rows.start],
                    row=self.rows.split.key(row),
                    label=label,
                    extension=extension,
                    source=source,
                )
        return findings.record() | {"files": writer.files}


@dataclass(frozen=True)
class CollectShard:
    """Shuffled, third pass: a shard reads its samples from all spill files."""

    spills: tuple[str, ...]
    shard: int
    path: str
    sidecar_path: str
    records_path: str

    def run(self, count: Count) -> dict:
        with _writer(self) as writer:
            for image, entry in read_spilled(self.spills, self.shard):
                writer.write(
                    f"{entry['row']:09d}",
                    image,
                    extension=entry["extension"].decode(),
                    label=int(entry["label"]),
                    source=int(entry["source"]),
                )
                count(1, len(image))
        return writer.record()


def _writer(task: CopyRows | CollectShard) -> ShardWriter:
    return ShardWriter(task.path, sidecar_path=task.sidecar_path, records_path=task.records_path)


Task = CountLabels | CopyRows | SpillRows | CollectShard


def record_path(task: Task) -> str:
    """Where the record of a task stands once it is done."""
    return f"{task.path}.done"


def run_task(task: Task, count: Count) -> dict:
    """The record of a task: as it was left by an earlier run, else the task is run."""
    return recorded(record_path(task), lambda: task.run(count))
