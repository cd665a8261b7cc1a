"""What a conversion reads. A source has splits, and a split has rows: an image and a label each.

A new kind of source is a file in `sources/` and a line in `opening.KINDS`:

1. A subclass of `SourceSplit`, a frozen dataclass (`eq=False` if it holds arrays), says what the
   split is (its fields) and gives labels and rows of any range (its two methods). It is pickled
   into other processes, so it holds paths, not open files. A listing of names is a `names.Names`;
   a split that holds one overrides `part`, so that a process gets the names of its rows only.
2. A function `find(source, count)` gives `{split name: opener}` for a source that is of this kind,
   and None for any other. It calls `count(num, 0)` with files as it lists them, for the progress.
   `opener(image=…, label=…)` returns the `SourceSplit`; image and label name columns, or are None.
   It raises `NoLabels` for a split that has none.

All the rest is the same for every source: class names, order, bad rows, shards, `verify --against`.

The laws that a source keeps:

- Rows are numbered from 0 in an order that depends on the input alone, not on the file system,
  the time or the number of processes. A sample's key is its row's number.
- The same input has the same digest, and another input another one, if it can be helped without
  reading all images. Paths above the source and times of change are not part of it.
- `rows(start, stop)` gives every row of the range once, in order. A row without a usable image is
  a `DataError` in its place. Only what makes the whole source unreadable is raised.
- Memory stays flat: a few megabytes of images at a time, at most 150 bytes a row for a listing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wds_convnext.errors import DataError, UsageError

UNLABELLED = -1  # stands for a null, negative or unknown label
BATCH_BYTES = 2 << 20  # image bytes that a source holds at a time
MAX_BATCH = 128  # rows that a source holds at a time

# Class numbers or class names, one for each row: an Arrow array, a NumPy array, a list.
Labels: TypeAlias = Any


class NoLabels(UsageError):
    """A split has no labels; the test split of a benchmark often has none.

    `reason` says so of "it", for the report on a source whose other splits have some.
    """

    def __init__(self, text: str, *, reason: str):
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows: encoded images, or why a row has none, and labels as in the source."""

    first_row: int
    images: Sequence[bytes | memoryview | DataError]
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class SourceSplit(ABC):
    """One split of a source, as a value that any process can read.

    Attributes:
        name: of the split, which names the shards; `naming.purpose` says what it is for.
        num_rows: rows are numbered from 0.
        num_bytes: of all encoded images, about; shard sizes and disk space are planned by it.
        digest: identifies the input; other digest, other input.
        dataset: what the manifest calls the data set.
        files: the input's files or folders, for the manifest and for messages.
        columns: what images and labels are taken from, for the report and the manifest.
        class_names: what label 0, 1, … is called; None if labels are names, or have none.
        file_starts: the row at which each file begins, and num_rows. By default there is a shard
            per file; () where files are no such unit.
        read_starts: rows at which reading can begin at no extra cost, and num_rows; () for any.
        notes: what the report says of the input besides, a line each.
    """

    name: str
    num_rows: int
    num_bytes: int
    digest: str
    dataset: str = "data"
    files: tuple[str, ...] = ()
    columns: tuple[str, str] = ("image", "label")
    class_names: tuple[str, ...] | None = None
    file_starts: tuple[int, ...] = ()
    read_starts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def labels(self, start: int, stop: int) -> Iterable[Labels]:
        """The labels of rows [start, stop), in chunks: all numbers or all names."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        """Rows [start, stop), in order, about `BATCH_BYTES` at a time.

        Raises:
            DataError: if the source has vanished or is damaged.
        """

    def locate(self, row: int) -> tuple[str, int | None]:
        """The name of the file that holds a row, and the row's number in it if it has others."""
        return self.name, row

    def key(self, row: int) -> int:
        """The number that a sample's key states; of a view of another split the row there."""
        return row

    def rows_with(self, keys: np.ndarray) -> np.ndarray:
        """The rows that have these keys, int64; -1 where there is none."""
        return np.where((keys >= 0) & (keys < self.num_rows), keys, -1)

    @property
    def selection(self) -> dict | None:
        """How the split was made of another one; None if it is as the source has it."""
        return None

    def part(self, start: int, stop: int) -> Self:
        """The same split for a process that reads rows of [start, stop) only; may hold less."""
        return self

    @property
    def where(self) -> str:
        """What messages call the split's input."""
        return self.files[0] if self.files else self.name

    def place(self, row: int) -> str:
        """Where a row stands, in words."""
        file, number = self.locate(row)
        return file if number is None else f"row {number} of {file}"


Count = Callable[[int, int], None]  # called with units and bytes that have been dealt with
Opener = Callable[..., SourceSplit]  # called with image and label: names of columns, or None


def read_rows(split: SourceSplit, start: int, stop: int) -> Iterator[RowBatch]:
    """Rows [start, stop) of a split, as its `rows` gives them, if they are all there and in order.

    Raises:
        DataError: if they are not, and what `rows` raises.
    """
    row = start
    for batch in split.rows(start, stop):
        if batch.first_row != row or len(batch.labels) != len(batch.images):
            raise DataError(
                f"row {row} of {split.name} was expected, and row {batch.first_row} came, "
                f"{len(batch.images)} images and {len(batch.labels)} labels."
            )
        yield batch
        row += len(batch.images)
    if row != stop:
        raise DataError(
            f"rows {start} to {stop} of {split.name} were asked for, and those up to {row} came."
        )


def refuse_columns(
    where: str, columns: tuple[str, str], image: str | None, label: str | None
) -> None:
    """Raise UsageError if the user named columns of a source that has none.

    Args:
        columns: what its `SourceSplit.columns` are, which `verify --against` hands back.
    """
    for flag, named, own in zip(("image", "label"), (image, label), columns):
        if named not in (None, own):
            raise UsageError(f"--{flag}-column {named}: {where} has no columns. Leave it out.")


def as_array(labels: Labels) -> pa.Array:
    """Labels as an Arrow array, dictionaries decoded.

    Raises:
        DataError: if they are not all integers or all names.
    """
    try:
        array = labels if isinstance(labels, pa.Array) else pa.array(labels)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise DataError(f"labels are not all integers or all names ({error})") from None
    if pa.types.is_floating(array.type) or pa.types.is_nested(array.type):
        raise DataError(f"labels are not integers or names, but {array.type}")
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def label_numbers(labels: Labels, class_names: tuple[str, ...]) -> np.ndarray:
    """Labels as class numbers, int64; UNLABELLED where null or not a class."""
    column = as_array(labels)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        # Not safe: uint64 beyond int64 becomes negative, which is no class either.
        numbers = column.cast(pa.int64(), safe=False).fill_null(UNLABELLED).to_numpy(False)
    else:
        names = pa.array(class_names, pa.large_string())
        found = pc.index_in(column.cast(pa.large_string()), value_set=names)
        numbers = found.cast(pa.int64()).fill_null(UNLABELLED).to_numpy(False)
    return np.where((numbers < 0) | (numbers >= len(class_names)), UNLABELLED, numbers)
