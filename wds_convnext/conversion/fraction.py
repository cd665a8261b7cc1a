"""Splits by fraction: a part of a split's rows, chosen by a hash of the image's content.

Rows whose hash is in the lowest `val_fraction` of all hashes are for validation, those in the
highest `test_fraction` for test, the others stay. So a row's split depends on its image alone: it
does not change when rows are added or moved, exact duplicates stay together, and one fraction may
change without the other's rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from wds_convnext.conversion.layout import unit_edges
from wds_convnext.conversion.shrink import digest_image
from wds_convnext.conversion.source import (
    UNLABELLED,
    Count,
    Labels,
    RowBatch,
    SourceSplit,
    as_array,
    label_numbers,
    read_rows,
)
from wds_convnext.errors import DataError, UsageError, listing
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.naming import is_held_out, purpose

_MOST_LISTED = 100  # classes in a note


@dataclass(frozen=True)
class Fractions:
    """How much of a split's rows are for validation and for test, 0 to 1."""

    validation: float
    test: float

    def select(self, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """The rows for each use, ascending, given each row's hash (uint64)."""
        shares = hashes / 2.0**64
        is_validation, is_test = shares < self.validation, shares >= 1 - self.test
        return {
            "train": np.flatnonzero(~is_validation & ~is_test),
            "validation": np.flatnonzero(is_validation),
            "test": np.flatnonzero(is_test & ~is_validation),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectedRows(SourceSplit):
    """Some rows of a split, under the numbers that they have there.

    Attributes:
        base: the split.
        selected: int64, its rows, ascending; of a `part` those of the part.
        fractions: by what the rows were chosen.
        parts: how many rows each part has, by name; this one's, too.
        first: the row of the first of them.
    """

    base: SourceSplit
    selected: np.ndarray
    fractions: Fractions
    parts: dict[str, int]
    first: int = 0

    @property
    def selection(self) -> dict:
        fractions = self.fractions
        return {"of": self.base.name, "val": fractions.validation, "test": fractions.test}

    def labels(self, start: int, stop: int) -> Iterator[Labels]:
        wanted, row = self._rows(start, stop), self._rows(start, stop)[0]
        for chunk in self.base.labels(row, wanted[-1] + 1):
            array = as_array(chunk)
            begin, end = np.searchsorted(wanted, [row, row + len(array)])
            yield array.take(wanted[begin:end] - row)
            row += len(array)

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        wanted, done = self._rows(start, stop), 0
        # Where reading can begin anywhere, the rows between are not read.
        cuts: Any = [] if self.base.read_starts else np.flatnonzero(np.diff(wanted) > 1) + 1
        for run in np.split(wanted, cuts):
            for batch in self.base.rows(run[0], run[-1] + 1):
                stop_row = batch.first_row + len(batch.images)
                own = run[slice(*np.searchsorted(run, [batch.first_row, stop_row]))]
                if len(own):
                    taken = own - batch.first_row
                    images = [batch.images[i] for i in taken.tolist()]
                    yield RowBatch(start + done, images, as_array(batch.labels).take(taken))
                    done += len(own)

    def key(self, row: int) -> int:
        return int(self.selected[row - self.first])

    def rows_with(self, keys: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(self.selected, keys)
        found = self.selected[np.minimum(rows, len(self.selected) - 1)] == keys
        return np.where(found, rows + self.first, -1)

    def locate(self, row: int) -> tuple[str, int | None]:
        return self.base.locate(self.key(row))

    def part(self, start: int, stop: int) -> Self:
        rows = self._rows(start, stop)
        base = self.base.part(int(rows[0]), int(rows[-1]) + 1)
        return replace(self, base=base, selected=rows, first=start)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self.selected[start - self.first : stop - self.first]


def choose_base(splits: list[SourceSplit], fractions: Fractions) -> SourceSplit:
    """The split that is to be divided: the one that is not held out.

    Raises:
        UsageError: if there is another, or the source has a split for the same use.
    """
    for split in splits:
        if getattr(fractions, purpose(split.name) or "", 0):
            flag = {"validation": "--val-fraction", "test": "--test-fraction"}
            raise UsageError(
                f"{flag[str(purpose(split.name))]}: the source has a split for it, {split.name}. "
                "Leave the option out, or name the training part of the source alone."
            )
    bases = [split for split in splits if not is_held_out(split.name)]
    if len(bases) != 1:
        names = listing(split.name for split in bases) or "none"
        raise UsageError(f"--val-fraction, --test-fraction: one split is divided, found {names}.")
    return bases[0]


def divide(
    base: SourceSplit, fractions: Fractions, *, workers: Workers, quiet: bool
) -> dict[str, SelectedRows]:
    """The parts of a split that have rows, by name: its own, validation and test."""
    edges = unit_edges(base)
    tasks = [(base.part(start, stop), start, stop) for start, stop in zip(edges, edges[1:])]
    progress = Progress(f"{base.name}: hash", total=base.num_rows, quiet=quiet)
    hashes = np.concatenate(workers.run(_hash_rows, tasks, progress=progress))
    selected = fractions.select(hashes)
    selected = {base.name if use == "train" else use: rows for use, rows in selected.items()}
    return {
        name: SelectedRows(
            name=name,
            num_rows=len(rows),
            num_bytes=base.num_bytes * len(rows) // base.num_rows,
            digest=base.digest,
            dataset=base.dataset,
            files=base.files,
            columns=base.columns,
            class_names=base.class_names,
            read_starts=tuple(np.searchsorted(rows, base.read_starts).tolist()),
            notes=base.notes,
            base=base,
            selected=rows,
            fractions=fractions,
            parts={other: len(others) for other, others in selected.items()},
        )
        for name, rows in selected.items()
        if len(rows)
    }


def with_counts(split: SelectedRows, class_names: tuple[str, ...]) -> SelectedRows:
    """The same split, with notes on how many rows each class has in it."""
    counts = np.zeros(len(class_names), np.int64)
    for chunk in split.labels(0, split.num_rows):
        numbers = label_numbers(chunk, class_names)
        counts += np.bincount(numbers[numbers != UNLABELLED], minlength=len(class_names))
    pairs = list(zip(class_names, counts.tolist()))
    notes = [f"rows per class: {listing((f'{n} {k:,}' for n, k in pairs), limit=_MOST_LISTED)}"]
    if none := [name for name, number in pairs if number == 0]:
        notes.append(f"classes without a row here: {listing(none)}")
    return replace(split, notes=(*split.notes, *notes))


def _hash_rows(task: tuple[SourceSplit, int, int], count: Count) -> np.ndarray:
    """A hash of each row's image, uint64; the middle for a row without one, which stays."""
    split, start, stop = task
    hashes = []
    for batch in read_rows(split, start, stop):
        images = [None if isinstance(image, DataError) else image for image in batch.images]
        hashes += [1 << 63 if image is None else digest_image(image) for image in images]
        count(len(images), sum(len(image) for image in images if image is not None))
    return np.array(hashes, np.uint64)
