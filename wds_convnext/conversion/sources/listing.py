"""The image files below class folders, listed in little memory, and what else stands there.

The folders are those of a disk, or of an archive (`places.Tree`): the rules are the same.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from wds_convnext.conversion.names import Names
from wds_convnext.conversion.source import Count
from wds_convnext.conversion.sources.images import file_size, has_image_suffix, is_image, is_visible
from wds_convnext.errors import UsageError, listing


def scan(folder: str) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, each sorted; hidden ones left out.

    Raises:
        UsageError: if the folder cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:  # names alone are kept: an entry takes 300 bytes
            for entry in entries:
                if is_visible(entry.name):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror}).") from None
    return sorted(folders), sorted(files)


class Tree(Protocol):
    """Folders of files; those that are hidden are left out."""

    def scan(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the folders and of the files in a folder, each sorted."""

    def size(self, path: str) -> int: ...

    def is_image(self, path: str) -> bool:
        """Whether a file is an image by its name, or else by its first bytes."""

    def identity(self, folder: str) -> object:
        """Tells folders apart, also where a link leads to one of another name."""


class Disk:
    """The folders of the file system."""

    def scan(self, folder: str) -> tuple[list[str], list[str]]:
        return scan(folder)

    def size(self, path: str) -> int:
        return file_size(path)

    def is_image(self, path: str) -> bool:
        return is_image(path)

    def identity(self, folder: str) -> tuple[int, int]:
        facts = os.stat(folder)
        return facts.st_dev, facts.st_ino


class ClassListing:
    """The images of a split: those in its class folders and in all folders below.

    Attributes:
        paths: of the image files, below the split's folder, by class and then by path.
        counts: images of each class, by the name of its folder, sorted.
        num_bytes: of all image files.
        digest: of their paths and sizes.
        num_outside: images that are in no class folder, so that they have no label.
    """

    def __init__(self, folder: str, tree: Tree, count: Count):
        self.folder = folder
        self._tree = tree
        self._count = count
        self.counts: dict[str, int] = {}
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._other: Counter[str] = Counter()  # files that are no images, by suffix
        self._first_other = ""
        self._num_below = 0  # images in folders below class folders
        folders, files = tree.scan(folder)
        self.num_outside = sum(1 for _ in self._images(folder, files))
        self.paths = Names.of(path for name in folders for path in self._class(name))
        self.digest = self._digest.hexdigest()[:16]

    def _class(self, name: str) -> Iterator[bytes]:
        self.counts[name] = 0
        for path, num_bytes in self._walk(name, ()):
            self.counts[name] += 1
            self._num_below += path.count("/") > 1
            self.num_bytes += num_bytes
            encoded = os.fsencode(path)
            self._digest.update(b"%s\0%d\0" % (encoded, num_bytes))
            yield encoded

    def _walk(self, below: str, above: tuple[object, ...]) -> Iterator[tuple[str, int]]:
        """Path and size of each image in a folder and below; a link to a folder above is not
        followed."""
        folder = os.path.join(self.folder, below)
        if (place := self._tree.identity(folder)) in above:
            return
        folders, files = self._tree.scan(folder)
        for name in self._images(folder, files):
            yield f"{below}/{name}", self._tree.size(f"{folder}/{name}")
        del files
        for name in folders:
            yield from self._walk(f"{below}/{name}", (*above, place))

    def _images(self, folder: str, files: list[str]) -> Iterator[str]:
        self._count(len(files), 0)
        for name in files:
            if has_image_suffix(name) or self._tree.is_image(os.path.join(folder, name)):
                yield name
            else:
                self._other[os.path.splitext(name)[1].lower() or "no suffix"] += 1
                self._first_other = self._first_other or os.path.join(folder, name)

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the folder, a line each."""
        notes = []
        if self._other:
            kinds = listing(f"{kind} {num:,}" for kind, num in self._other.most_common())
            notes.append(
                f"left out: {self._other.total():,} files that are no images ({kinds}), "
                f"the first is {self._first_other}"
            )
        if self.num_outside:
            notes.append(f"left out: {self.num_outside:,} images that are in no class folder")
        if empty := [name for name, number in self.counts.items() if number == 0]:
            notes.append(f"class folders without an image: {listing(empty)}")
        if self._num_below:
            notes.append(f"{self._num_below:,} images are in folders below class folders")
        return tuple(notes)
