"""The files of an archive as a tree of folders, in little memory: names, and where each stands."""

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from wds_convnext.conversion.names import Names
from wds_convnext.conversion.source import Count
from wds_convnext.conversion.sources.images import is_visible


class Entry(NamedTuple):
    """A file in an archive. `stored` bytes stand at `offset`; `method` says how, by the format."""

    name: bytes
    offset: int
    stored: int
    num_bytes: int
    crc: int = 0
    method: int = 0
    is_image: bool = False


# Entries without their names, 30 bytes each.
PLACE = np.dtype(
    [
        ("offset", np.int64),
        ("stored", np.int64),
        ("num_bytes", np.int64),
        ("crc", np.uint32),
        ("method", np.uint8),
        ("is_image", np.bool_),
    ]
)


def is_shown(name: bytes) -> bool:
    """Whether a file is meant to be seen, and all folders above it are."""
    parts = os.fsdecode(name).split("/")
    return all(map(is_visible, (part for part in parts if part not in ("", "."))))


class Tree:
    """The files of an archive by folder, as `listing` walks over them; the root is ''.

    Of two files of one name the last counts, as when an archive is unpacked.

    Attributes:
        names: sorted, each once.
        places: PLACE, of each name.
        num_repeated: files that another of the same name replaces.
    """

    def __init__(self, entries: Iterable[Entry], count: Count):
        content, ends, facts = bytearray(), array("q", [0]), bytearray()
        one = np.zeros(1, PLACE)
        for entry in entries:
            name = b"/".join(part for part in entry.name.split(b"/") if part not in (b"", b"."))
            content += name
            ends.append(len(content))
            one[0] = tuple(entry[1:])
            facts += one.tobytes()
            count(1, 0)
        names = Names(np.frombuffer(content, np.uint8), np.frombuffer(ends, np.int64))
        order = sorted(range(len(names)), key=names.__getitem__)  # stable: the last one stays last
        is_last = [
            i + 1 == len(order) or names[row] != names[order[i + 1]] for i, row in enumerate(order)
        ]
        order = [row for row, last in zip(order, is_last) if last]
        self.num_repeated = len(names) - len(order)
        self.names = Names.of(names[row] for row in order)
        self.places = np.frombuffer(facts, PLACE)[order]
        self._guess = 0

    def find(self, path: str | bytes) -> int:
        """The number of a file."""
        name = os.fsencode(path)
        # Mostly they are asked for in order.
        if self._guess >= len(self.names) or self.names[self._guess] != name:
            self._guess = bisect_left(self.names, name)
        self._guess += 1
        return self._guess - 1

    def scan(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the folders and of the files in a folder, each sorted."""
        prefix = os.fsencode(folder) + b"/" if folder else b""
        folders: list[str] = []
        files: list[str] = []
        at = bisect_left(self.names, prefix)
        while at < len(self.names) and (name := self.names[at]).startswith(prefix):
            own, slash, _ = name[len(prefix) :].partition(b"/")
            (folders if slash else files).append(os.fsdecode(own))
            at = bisect_left(self.names, prefix + own + b"0", at) if slash else at + 1
        return sorted(folders), sorted(files)

    def size(self, path: str) -> int:
        return int(self.places["num_bytes"][self.find(path)])

    def is_image(self, path: str) -> bool:
        return bool(self.places["is_image"][self.find(path)])

    def identity(self, folder: str) -> str:
        return folder
