"""A folder of class folders, with or without folders of splits above them.

`photos/cat/1.jpg`, or `photos/train/cat/1.jpg` next to `photos/val/`. The class folders of all
splits together, sorted by name, are the classes; a class has the images in its folder and in all
folders below. Links are followed. A row is an image file, ordered by class, then by path.
"""

import os
import re
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np

from wds_convnext.conversion.source import (
    Count,
    NoLabels,
    Opener,
    refuse_columns,
)
from wds_convnext.conversion.sources.images import FileSplit
from wds_convnext.conversion.sources.listing import ClassListing, Disk, Tree
from wds_convnext.conversion.sources.table import tables_of
from wds_convnext.errors import UsageError
from wds_convnext.shards.naming import purpose

COLUMNS = ("files", "class folders")


def find(source: str, count: Count) -> dict[str, Opener] | None:
    """The splits of a folder that has images in class folders; None for any other source.

    Raises:
        UsageError: if the classes are not clear, or a folder cannot be read.
    """
    if not os.path.isdir(source):
        return None
    own = Path(source).absolute().name
    listings = list_splits(source, own, Disk(), count)
    classes = find_classes(source, listings)
    if not classes:
        return None
    if len(classes) == 1 and tables_of(source):  # images/ next to train.csv
        return None
    return {
        name: partial(open_listed, name, split, classes, own) for name, split in listings.items()
    }


def list_splits(source: str, own: str, tree: Tree, count: Count) -> dict[str, ClassListing]:
    """The images of each split of a folder; `own` is the folder's name."""
    folders = _split_folders(source, own, tree)
    return {name: ClassListing(folder, tree, count) for name, folder in folders.items()}


def find_classes(source: str, listings: dict[str, ClassListing]) -> tuple[str, ...]:
    """The classes of all splits together, sorted.

    Raises:
        UsageError: if names cannot be told apart.
    """
    found = {name for split in listings.values() for name, num in split.counts.items() if num}
    classes = tuple(sorted(found))
    _check_names(source, classes)
    return classes


def _split_folders(source: str, own: str, tree: Tree) -> dict[str, str]:
    """The folder of each split: those named for a use that have folders, else the source."""
    folders, _ = tree.scan(source)
    named = [name for name in folders if purpose(name.lower())]
    if len(named) < len(folders):  # `test_tube` next to `beaker` is a class
        named = [name for name in named if name.isalpha()]
    splits = {re.sub(r"[^\w-]", "_", name): os.path.join(source, name) for name in named}
    if any(tree.scan(folder)[0] for folder in splits.values()):
        return splits
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


def open_listed(
    name: str,
    split: ClassListing,
    classes: tuple[str, ...],
    dataset: str,
    *,
    image: str | None = None,
    label: str | None = None,
) -> FileSplit:
    """A split whose images are listed.

    Raises:
        NoLabels: if none is in a class folder.
    """
    refuse_columns(split.folder, COLUMNS, image, label)
    if split.num_outside and not len(split.paths):
        raise NoLabels(
            f"{split.folder}: {split.num_outside:,} images, but no class folders.",
            reason="its images are in no class folders",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    counts = {numbers[name]: num for name, num in split.counts.items() if num}
    return FileSplit(
        name=name,
        num_rows=len(split.paths),
        num_bytes=split.num_bytes,
        digest=split.digest,
        dataset=dataset,
        files=(split.folder,),
        columns=COLUMNS,
        class_names=classes,
        notes=split.notes(),
        folder=split.folder,
        paths=split.paths,
        codes=np.repeat(np.array([*counts], np.int32), [*counts.values()]),
    )
