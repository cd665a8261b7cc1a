"""A zip or tar of class folders, read in place: nothing is unpacked to the disk.

The rules are those of a folder (`folder`). Folders that hold nothing but one folder are passed
over, as `photos/cat/1.jpg` is packed with `zip -r photos.zip photos`. The rows of a zip stand in
the order that the folder would have; those of a tar in its own, so that one that is compressed can
be read from start to end.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Self

import numpy as np

from wds_convnext.conversion.source import Count, Opener, RowBatch, refuse_columns
from wds_convnext.conversion.sources.folder import COLUMNS, find_classes, list_splits, open_listed
from wds_convnext.conversion.sources.images import FileSplit
from wds_convnext.conversion.sources.listing import ClassListing
from wds_convnext.conversion.sources.places import Entry, Tree
from wds_convnext.conversion.sources.tars import TarArchive, is_tar
from wds_convnext.conversion.sources.zips import ZipArchive, is_zip
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.naming import purpose

_SUFFIX = re.compile(r"\.(zip|tar|tgz|tbz2|txz|tar\.\w+)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArchiveSplit(FileSplit):
    """Image files of an archive; `places` (PLACE) are those of a part."""

    archive: str
    places: np.ndarray

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        try:
            _open_again(self.archive)
        except OSError as error:
            raise DataError(f"{self.archive}: cannot be read ({error.strerror}).") from None
        return super().rows(start, stop)

    def read(self, row: int) -> bytes | DataError:
        place = self.places[row - self.first].tolist()
        try:
            return _open_again(self.archive).read(Entry(self.paths[row - self.first], *place))
        except DataError as error:
            return error

    def part(self, start: int, stop: int) -> Self:
        own = slice(start - self.first, stop - self.first)
        return replace(super().part(start, stop), places=self.places[own])


def find(source: str, count: Count) -> dict[str, Opener] | None:
    """The splits of a zip or tar of class folders; None for any other source.

    Raises:
        UsageError: if it is damaged or encrypted, or has no images in class folders.
    """
    if not os.path.isfile(source) or not (is_zip(source) or is_tar(source)):
        return None
    with _open(source) as archive:
        tree = Tree(archive.entries(), count)
        is_tape = isinstance(archive, TarArchive)
    own = _SUFFIX.sub("", os.path.basename(source))
    listings = list_splits(_top(tree), own, tree, lambda num, num_bytes: None)
    classes = find_classes(source, listings)
    if not classes:
        raise UsageError(
            f"{source}: {len(tree.names):,} files, but no images in class folders (cat/1.jpg). "
            "Pack a folder of class folders."
        )
    return {
        name: partial(_open_split, source, name, split, classes, own, tree, is_tape)
        for name, split in listings.items()
    }


def _top(tree: Tree) -> str:
    """The folder that the splits or classes stand in."""
    top = ""
    while True:
        folders, files = tree.scan(top)
        below = os.path.join(top, folders[0]) if len(folders) == 1 else ""
        is_wrapper = below and not purpose(folders[0].lower()) and tree.scan(below)[0]
        if not is_wrapper or any(tree.is_image(os.path.join(top, name)) for name in files):
            return top
        top = below


def _open_split(
    source: str,
    name: str,
    listed: ClassListing,
    classes: tuple[str, ...],
    own: str,
    tree: Tree,
    is_tape: bool,
    **columns: str | None,
) -> ArchiveSplit:
    refuse_columns(source, COLUMNS, columns["image"], columns["label"])
    split = open_listed(name, listed, classes, own)
    folder = os.fsencode(listed.folder)
    rows = range(split.num_rows)
    numbers = [tree.find(os.path.join(folder, split.paths[row])) for row in rows]
    places = tree.places[np.array(numbers, np.int64)]
    order = np.argsort(places["offset"], kind="stable") if is_tape else np.arange(len(places))
    notes = split.notes
    if tree.num_repeated:
        notes += (f"{tree.num_repeated:,} files come again later, which counts",)
    known = {field.name: getattr(split, field.name) for field in fields(split)}
    return ArchiveSplit(**known | {
        "digest": hashlib.sha256(split.digest.encode() + places["crc"].tobytes()).hexdigest()[:16],
        "files": (source,),
        "read_starts": (0, split.num_rows) if _open_again(source).is_sequential else (),
        "notes": notes,
        "paths": split.paths.take(order),
        "codes": split.codes[order],
        "places": places[order],
        "archive": source,
    })  # fmt: skip


def _open(source: str) -> ZipArchive | TarArchive:
    return ZipArchive(source) if is_zip(source) else TarArchive(source)


def _open_again(source: str) -> ZipArchive | TarArchive:
    """An archive that stays open in this process, so that a stream is read on from where it is."""
    facts = os.stat(source)
    return _kept(source, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _kept(source: str, *_: int) -> ZipArchive | TarArchive:
    return _open(source)
