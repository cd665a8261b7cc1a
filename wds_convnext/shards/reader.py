"""`(shard, sample) -> bytes and label`, with one `pread`; and the shards that a spec names.

A member's tar header stands right before its data. It is read along and compared with the index
every time, so an offset that no longer fits is an error, never another image. A `pread` per
sample costs about 17 us; iterating over a tar costs 107-141 us.
"""

import glob
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from wds_convnext.errors import DataError, ShardError
from wds_convnext.shards.spec import (
    Shard,
    ShardSet,
    expand_spec,
    manifest_path,
    read_manifest,
    split_of,
    staging_path,
)
from wds_convnext.shards.tar import (
    BLOCK,
    Member,
    TarIndex,
    index_samples,
    read_samples,
)

_MAX_GAP = 8192  # bytes; an image and a label that are nearer than this are read together


class SampleReader:
    """Reads samples of a set of shards by number; keeps few files open and few indexes loaded.

    Indexes are loaded when first needed. `max_indexed` bounds the samples whose offsets are held
    (24 MB per million), so memory does not follow the size of the data set.
    """

    def __init__(
        self,
        shards: tuple[Shard, ...],
        *,
        label_field: str = "label",
        max_open: int = 256,
        max_indexed: int = 1_000_000,
    ):
        self.shards = shards
        self.label_field = label_field
        self.max_open = max_open
        self.max_indexed = max_indexed
        self.num_opened = 0
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, TarIndex] = OrderedDict()
        self._members_of = lru_cache(maxsize=64)(_read_members)

    def read(self, shard: int, sample: int) -> tuple[bytes, int]:
        """The encoded image and the label of one sample.

        Raises:
            ShardError: if the shard does not hold what its index says.
            DataError: if the label is not an integer.
        """
        image, label = self._members(shard, sample)
        start = min(image[0], label[0]) - BLOCK
        end = max(sum(image), sum(label))
        if end - start <= image[1] + label[1] + _MAX_GAP:
            span = self._pread(shard, end - start, start)
            image_data = self._member(shard, image, span, start)
            label_data = self._member(shard, label, span, start)
        else:
            image_data, label_data = (
                self._read_member(shard, image),
                self._read_member(shard, label),
            )
        return image_data, self._parse_label(label_data, shard, sample)

    def will_read(self, shard: int, sample: int) -> None:
        """Have the system fetch a sample's image, without waiting; what fails, fails in `read`.

        Cold, on a virtual disk, a sample then costs 0.14 ms instead of 0.34; cached, 0.005 more.
        """
        if hasattr(os, "posix_fadvise"):  # not on macOS
            with suppress(ShardError, OSError):
                (offset, num_bytes), _ = self._members(shard, sample)
                file = self._file(shard)
                os.posix_fadvise(file, offset - BLOCK, BLOCK + num_bytes, os.POSIX_FADV_WILLNEED)

    def read_label(self, shard: int, sample: int) -> int:
        """The label of one sample, without reading its image. Raises as `read` does."""
        _, label = self._members(shard, sample)
        return self._parse_label(self._read_member(shard, label), shard, sample)

    def read_raw(self, shard: int, sample: int) -> dict:
        """A sample as webdataset's dict: `__key__`, `__url__`, and bytes per extension."""
        path = self.shards[shard].path
        members = self._members_of(self.shards[shard])[sample]
        data = {m.extension: self._read_member(shard, (m.offset, m.num_bytes)) for m in members}
        return {"__key__": members[0].key, "__url__": path, **data}

    def describe(self, shard: int, sample: int) -> dict:
        """Shard, key and byte offset of a sample's image, for messages and reports."""
        key = self._members_of(self.shards[shard])[sample][0].key
        offset = int(self._index(shard).image_offset[sample])
        return {"shard": self.shards[shard].path, "key": key, "offset": offset}

    def close(self) -> None:
        """Close the shards; reading again opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _members(self, shard: int, sample: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(offset, bytes) of a sample's image, and of its label."""
        index = self._index(shard)
        image = int(index.image_offset[sample]), int(index.image_bytes[sample])
        label = int(index.label_offset[sample]), int(index.label_bytes[sample])
        return image, label

    def _read_member(self, shard: int, member: tuple[int, int]) -> bytes:
        start = member[0] - BLOCK
        span = self._pread(shard, member[1] + BLOCK, start)
        return self._member(shard, member, span, start)

    def _pread(self, shard: int, num_bytes: int, start: int) -> bytes:
        try:
            return os.pread(self._file(shard), num_bytes, start)
        except OSError as error:
            raise ShardError(
                f"{self.shards[shard].path}: byte {start:,} cannot be read ({error.strerror}). "
                "Look at the disk or network that holds it."
            ) from None

    def _member(self, shard: int, member: tuple[int, int], span: bytes, start: int) -> bytes:
        """The data of a member (offset, bytes) within `span`, the shard's bytes from `start`."""
        offset, num_bytes = member
        data = span[offset - start : offset - start + num_bytes]
        header = span[offset - start - BLOCK : offset - start]
        if len(data) != num_bytes or not _announces(header, num_bytes):
            raise ShardError(
                f"{self.shards[shard].path}: no member of {num_bytes} bytes at byte {offset:,}, "
                "where its index says so. The shard or its .idx is damaged: "
                "copy them again, or write them again."
            )
        return data

    def _parse_label(self, data: bytes, shard: int, sample: int) -> int:
        try:
            if self._index(shard).label_extension == "cls":
                return int(data)
            label = json.loads(data)[self.label_field]
            if isinstance(label, float) and not label.is_integer():
                raise ValueError(label)
            return int(label)
        except (ValueError, KeyError, TypeError):
            where = self.describe(shard, sample)
            raise DataError(
                f"{where['shard']}, key {where['key']}: the label {data[:40]!r} is not an integer. "
                "Labels are class numbers, in .cls or in the field "
                f"{self.label_field!r} of .json."
            ) from None

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self.max_open:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ShardError(f"{self.shards[shard].path}: {error.strerror}.") from None
            self.num_opened += 1
        self._files.move_to_end(shard)
        return self._files[shard]

    def _index(self, shard: int) -> TarIndex:
        if shard not in self._indexes:
            index = load_index(self.shards[shard])
            room = self.max_indexed - len(index)
            while self._indexes and sum(map(len, self._indexes.values())) > room:
                self._indexes.popitem(last=False)
            self._indexes[shard] = index
        self._indexes.move_to_end(shard)
        return self._indexes[shard]


def _announces(header: bytes, num_bytes: int) -> bool:
    """Whether this is the tar header of a member of so many bytes (octal, or base 256)."""
    field = header[124:136]
    try:
        if field[:1] == b"\x80":
            announced = int.from_bytes(field[1:], "big")
        else:
            announced = int(field.rstrip(b"\0 "), 8)
    except ValueError:
        return False
    return header[257:262] == b"ustar" and announced == num_bytes


def load_index(shard: Shard) -> TarIndex:
    """The index of one shard, checked against what is known of it.

    Raises:
        ShardError: if the shard is missing, or its size or number of samples is another.
    """
    return index_samples(shard.path, _read_members(shard))


def _read_members(shard: Shard) -> list[list[Member]]:
    """The members of each sample of one shard; checked, and raises, as `load_index` does."""
    check_size(shard)
    samples = read_samples(shard.path)
    if len(samples) != shard.num_samples:
        raise ShardError(
            f"{shard.path}: its index has {len(samples)} samples, expected {shard.num_samples}. "
            "Delete the .idx beside it, or run make shards."
        )
    return samples


def check_size(shard: Shard) -> None:
    """Compare a shard's size with its manifest's.

    Raises:
        ShardError: if the shard is missing or has another size.
    """
    try:
        num_bytes = os.path.getsize(shard.path)
    except OSError as error:
        raise ShardError(f"{shard.path}: {error.strerror}. Run make shards.") from None
    if shard.num_bytes not in (None, num_bytes):
        raise ShardError(
            f"{shard.path}: {num_bytes:,} bytes, but its manifest says {shard.num_bytes:,}. "
            "The shard is cut short or another file: copy it again, or run make shards."
        )


def check_sha256(shard: Shard) -> None:
    """Compare a shard's bytes with its manifest's checksum, if it has one.

    Raises:
        ShardError: if they differ.
    """
    if shard.sha256 is None:
        return
    with open(shard.path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise ShardError(
            f"{shard.path}: its SHA-256 is {found[:16]}…, but its manifest says "
            f"{shard.sha256[:16]}…. Copy the shard again, or write it again with make shards."
        )


def open_shards(spec: str, *, progress: Callable = iter) -> ShardSet:
    """The shards that a spec names, with their sizes and class names.

    Where a manifest stands beside them it is believed, and sizes are compared. Without one every
    shard is indexed and every label read once; `progress` wraps the list of shards meanwhile.

    Raises:
        ShardError: if nothing matches, or the shards do not fit their manifest or each other.
    """
    paths = expand_spec(spec)
    beside = dict.fromkeys(manifest_path(path) for path in paths)
    if all(os.path.isfile(path) for path in beside):
        shard_set = _from_manifests(paths, list(beside))
    else:
        for path in beside:
            if os.path.isdir(staging_path(path)) and not os.path.isfile(path):
                raise ShardError(
                    f"{staging_path(path)}: the conversion was interrupted, so shards may be "
                    "missing. Run the same make shards again: it goes on where it stopped."
                )
        shard_set = _survey(paths, progress)
    if shard_set.num_samples == 0:
        raise ShardError(f"{spec}: the shards hold no samples.")
    return shard_set


def find_validation(train_set: ShardSet) -> str | None:
    """A spec of the validation shards beside training shards, by name; None if there are none."""
    folder = os.path.dirname(train_set.shards[0].path)
    for split in ("validation", "val"):
        for pattern in (f"{split}.json", f"{split}-*.tar"):
            if glob.glob(os.path.join(glob.escape(folder), pattern)):
                return os.path.join(folder, pattern)
    return None


def _from_manifests(paths: list[str], manifest_paths: list[str]) -> ShardSet:
    manifests = [read_manifest(path) for path in manifest_paths]
    if len({manifest.class_names for manifest in manifests}) > 1:
        raise ShardError(
            f"{' and '.join(manifest_paths)}: their class names differ. Use one data set."
        )
    if len({manifest.label_field for manifest in manifests}) > 1:
        raise ShardError(
            f"{' and '.join(manifest_paths)}: their labels stand in different .json fields. "
            "Use one data set."
        )
    listed = {
        os.path.normpath(shard.path): shard for manifest in manifests for shard in manifest.shards
    }
    paths = list(map(os.path.normpath, paths))
    for path in paths:
        if path not in listed:
            raise ShardError(
                f"{path}: not listed in {manifest_path(path)}. Leave it out, or run make shards."
            )
        check_size(listed[path])
    first = manifests[0]
    shards = tuple(listed[path] for path in paths)
    return ShardSet(first.dataset, first.split, shards, first.class_names, first.label_field)


def _survey(paths: list[str], progress: Callable) -> ShardSet:
    shards, highest = [], -1
    for path in progress(paths):
        num_samples = len(index_samples(path, read_samples(path)))
        shard = Shard(path, num_samples, os.path.getsize(path))
        reader = SampleReader((shard,))
        labels = [reader.read_label(0, sample) for sample in range(num_samples)]
        reader.close()
        if labels and min(labels) < 0:
            raise ShardError(f"{path}: a label of {min(labels)}. Labels count from 0.")
        highest = max([highest, *labels])
        shards.append(shard)
    folder = os.path.basename(os.path.dirname(os.path.abspath(paths[0])))
    class_names = tuple(str(label) for label in range(highest + 1))
    return ShardSet(folder, split_of(paths[0]), tuple(shards), class_names)
