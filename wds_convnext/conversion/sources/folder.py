"""A folder of class folders, with or without folders of splits above them.

`photos/cat/1.jpg`, or `photos/train/cat/1.jpg` next to `photos/val/`. The class folders of all
splits together, sorted by name, are the classes; a class has the images in its folder and in all
folders below. Links are followed. A row is an image file, ordered by class, then by path.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from wds_convnext.conversion.names import Names
from wds_convnext.conversion.source import NoLabels, Opener, RowBatch, SourceSplit, refuse_columns
from wds_convnext.conversion.sources.images import read_files
from wds_convnext.conversion.sources.listing import ClassListing, scan
from wds_convnext.errors import UsageError
from wds_convnext.shards.naming import purpose

_COLUMNS = ("files", "class folders")


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderSplit(SourceSplit):
    """Image files of class folders. `paths` (below `folder`) and `classes` are those of a part."""

    folder: str
    paths: Names
    classes: np.ndarray  # int32, the class number of each path
    first: int = 0  # the row of the first path

    def labels(self, start: int, stop: int) -> Iterator[np.ndarray]:
        yield self._classes(start, stop)

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        return read_files(self._path, self._classes, start, stop)

    def locate(self, row: int) -> tuple[str, None]:
        return self.paths[row - self.first].decode(errors="backslashreplace"), None

    def part(self, start: int, stop: int) -> Self:
        paths = self.paths.part(start - self.first, stop - self.first)
        return replace(self, paths=paths, classes=self._classes(start, stop), first=start)

    def _path(self, row: int) -> bytes:
        return os.path.join(os.fsencode(self.folder), self.paths[row - self.first])

    def _classes(self, start: int, stop: int) -> np.ndarray:
        return self.classes[start - self.first : stop - self.first]


def find(source: str) -> dict[str, Opener] | None:
    """The splits of a folder that has images in class folders; None for any other source.

    Raises:
        UsageError: if the classes are not clear, or a folder cannot be read.
    """
    if not os.path.isdir(source):
        return None
    listings = {name: ClassListing(folder) for name, folder in _split_folders(source).items()}
    found = {name for split in listings.values() for name, num in split.counts.items() if num}
    if not found:
        return None
    classes = tuple(sorted(found))
    _check_names(source, classes)
    dataset = Path(source).absolute().name
    return {name: partial(_open, name, split, classes, dataset) for name, split in listings.items()}


def _split_folders(source: str) -> dict[str, str]:
    """The folder of each split: those named for a use that have folders, else the source."""
    folders, _ = scan(source)
    named = [name for name in folders if purpose(name.lower())]
    if len(named) < len(folders):  # `test_tube` next to `beaker` is a class
        named = [name for name in named if name.isalpha()]
    splits = {re.sub(r"[^\w-]", "_", name): os.path.join(source, name) for name in named}
    if any(scan(folder)[0] for folder in splits.values()):
        return splits
    own = Path(source).absolute().name
    return {own if own.isalpha() and purpose(own.lower()) else "train": source}


def _check_names(source: str, classes: tuple[str, ...]) -> None:
    for name in classes:
        if not name.isprintable():
            raise UsageError(
                f"{source}: the class folder {name!r} has no printable name. Rename it."
            )
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise UsageError(
                f"{source}: two class folders are called {name}, encoded differently "
                f"({other.encode()!r}, {name.encode()!r}). Give them one name."
            )


def _open(
    name: str,
    split: ClassListing,
    classes: tuple[str, ...],
    dataset: str,
    *,
    image: str | None = None,
    label: str | None = None,
) -> FolderSplit:
    refuse_columns(split.folder, _COLUMNS, image, label)
    if split.num_outside and not len(split.paths):
        raise NoLabels(
            f"{split.folder}: {split.num_outside:,} images, but no class folders.",
            reason="its images are in no class folders",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    counts = {numbers[name]: num for name, num in split.counts.items() if num}
    return FolderSplit(
        name=name,
        num_rows=len(split.paths),
        num_bytes=split.num_bytes,
        digest=split.digest,
        dataset=dataset,
        files=(split.folder,),
        columns=_COLUMNS,
        class_names=classes,
        notes=split.notes(),
        folder=split.folder,
        paths=split.paths,
        classes=np.repeat(np.array([*counts], np.int32), [*counts.values()]),
    )
