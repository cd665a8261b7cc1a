"""Which images are to be predicted: files, folders, zips, shards, or a list on stdin.

They are listed once, into a temporary file, a line for each. So their number is known before the
first is read, memory does not grow with it, and each worker reads the lines of its own batches.
"""

import json
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from wds_convnext.conversion.sources.images import (
    has_image_suffix,
    is_image,
    is_visible,
    read_image,
)
from wds_convnext.conversion.sources.listing import scan
from wds_convnext.errors import DataError, UsageError
from wds_convnext.pool import num_cores
from wds_convnext.progress import Progress
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.limits import MAX_BYTES
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader

# A file (path,); a zip's member (path, its number, its name); a sample (data set's number, number).
Reference = list[str | int]

STDIN = "-"
_SHARDS = re.compile(r"\.(tar|json)($|,)")
_BLOCK_BYTES = 1 << 16
# What zipfile raises for damaged, encrypted and foreign members.
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ImageList:
    """Images in order, cut into batches."""

    path: Path  # a reference in JSON on each line
    starts: np.ndarray  # int64 (num_batches + 1,): where each batch's lines begin, and the end
    num_images: int
    datasets: tuple[Dataset, ...]

    @property
    def num_batches(self) -> int:
        return len(self.starts) - 1

    def batch(self, number: int) -> list[Reference]:
        """The references of a batch; the last one may be short."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            lines = file.read(self.starts[number + 1] - self.starts[number])
        return [json.loads(line) for line in lines.splitlines()]


@contextmanager
def list_images(
    named: Sequence[str], *, batch_size: int, quiet: bool = False
) -> Iterator[ImageList]:
    """The images that arguments name, as long as the context lasts.

    Of a folder its images by name, then those in its folders; hidden ones are left out.

    Raises:
        UsageError: if an argument is not there, or no image is found.
        ShardError: if shards cannot be opened.
    """
    datasets: list[Dataset] = []
    with tempfile.TemporaryDirectory(prefix="wds_convnext-") as folder:
        path, starts, num_images = Path(folder, "images"), [0], 0
        with (
            open(path, "wb") as file,
            Progress("Listing", unit="images", quiet=quiet) as progress,
        ):
            for argument in named:
                for reference in _references(argument, datasets, quiet):
                    file.write(json.dumps(reference).encode() + b"\n")
                    num_images += 1
                    progress.add(1)
                    if num_images % batch_size == 0:
                        starts.append(file.tell())
            if num_images % batch_size:
                starts.append(file.tell())
        if num_images == 0:
            raise UsageError(
                f"{', '.join(named)}: no image found. Name files, folders or zips of images, "
                "shards, or - for a list on stdin."
            )
        yield ImageList(path, np.array(starts, dtype=np.int64), num_images, tuple(datasets))


def list_dataset(dataset: Dataset, folder: str, *, batch_size: int) -> ImageList:
    """The samples of a split, listed in a file of a folder."""
    path, starts = Path(folder, "images"), [0]
    with open(path, "wb") as file:
        for first in range(0, len(dataset), batch_size):
            numbers = range(first, min(first + batch_size, len(dataset)))
            file.write(b"".join(b"[0, %d]\n" % number for number in numbers))
            starts.append(file.tell())
    return ImageList(path, np.array(starts, dtype=np.int64), len(dataset), (dataset,))


def _references(argument: str, datasets: list[Dataset], quiet: bool) -> Iterable[Reference]:
    if argument == STDIN:
        return ([path] for path in _lines(sys.stdin.buffer))
    if os.path.isdir(argument):
        if not _holds_shards(argument):
            return ([path] for path in _files_in(argument, above=()))
    elif argument.lower().endswith(".zip"):
        return _members_of(argument)
    elif not _SHARDS.search(argument):
        if not os.path.exists(argument):
            raise UsageError(f"{argument}: no such file or folder.")
        return [[argument]]
    dataset = open_dataset(argument, use="validation", jobs=num_cores(), quiet=quiet)
    datasets.append(dataset)
    return ([len(datasets) - 1, number] for number in range(len(dataset)))


def _holds_shards(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".tar") for entry in entries)


def _files_in(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The images in a folder, then those in its folders; a link to a folder above is left out."""
    facts = os.stat(folder)
    if (own := (facts.st_dev, facts.st_ino)) in above:
        return
    folders, files = scan(folder)
    for path in (os.path.join(folder, name) for name in files):
        if is_image(path):
            yield path
    for name in folders:
        yield from _files_in(os.path.join(folder, name), (*above, own))


def _members_of(path: str) -> Iterator[Reference]:
    with _open_zip(path) as archive:
        for number, member in enumerate(archive.infolist()):
            name = member.filename
            if has_image_suffix(name) and all(map(is_visible, name.split("/"))):
                yield [path, number, name]


def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: not a readable zip ({reason}).") from None


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Paths that end with a line each, or with a NUL, as `find -print0` writes them."""
    rest, end = b"", None
    for block in iter(partial(stream.read, _BLOCK_BYTES), b""):
        rest += block
        end = end or (b"\0" if b"\0" in rest else b"\n")
        *whole, rest = rest.split(end)
        yield from map(os.fsdecode, filter(None, (line.rstrip(b"\r") for line in whole)))
    if rest.strip():
        yield os.fsdecode(rest.rstrip(b"\r"))


def name_of(reference: Reference, reader: "ImageReader") -> str:
    """What an image is called in the output: its path, or its container's path and its name."""
    if isinstance(reference[0], str):
        return "/".join(str(part) for part in reference if isinstance(part, str))
    where = reader.samples(reference[0]).describe(int(reference[1]))
    return f"{where['shard']}/{where['key']}"


class ImageReader:
    """Reads listed images; keeps zips and shards open. Not to be shared by processes."""

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = datasets
        self._held = ExitStack()
        self._zips: dict[str, zipfile.ZipFile] = {}
        self._samples: dict[int, SampleReader] = {}

    def read(self, reference: Reference) -> tuple[bytes, int | None]:
        """The encoded image, and its label where it is a sample of a shard.

        Raises:
            DataError: if it cannot be read.
            ShardError: if a shard does not hold what its index says.
        """
        if isinstance(reference[0], int):
            return self.samples(reference[0]).read(int(reference[1]))
        if len(reference) == 1:
            image = read_image(reference[0])
            if isinstance(image, DataError):
                raise image
            return image, None
        try:
            return self._read_member(reference[0], int(reference[1])), None
        except _UNREADABLE as error:
            raise DataError(f"cannot be read from the zip ({error})") from None

    def samples(self, dataset: int) -> SampleReader:
        if dataset not in self._samples:
            reader = SampleReader(self.datasets[dataset])
            self._samples[dataset] = reader
            self._held.callback(reader.close)
        return self._samples[dataset]

    def _read_member(self, path: str, number: int) -> bytes:
        if path not in self._zips:
            self._zips[path] = self._held.enter_context(_open_zip(path))
        member = self._zips[path].infolist()[number]
        if member.file_size > MAX_BYTES:
            raise DataError(f"{member.file_size:,} bytes, the limit is {MAX_BYTES:,}")
        return self._zips[path].read(member)

    def close(self) -> None:
        self._held.close()
        self._zips.clear()
        self._samples.clear()
