"""The one loop over the samples of a shard: for indexing, checking, describing and comparing."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from wds_convnext.errors import DataError, ShardError, listing, printable
from wds_convnext.shards.headers import BLOCK
from wds_convnext.shards.index import HAS_CHECKSUM, JSON_LABEL, Record, checksum
from wds_convnext.shards.reader import OTHER_FIELD, cut_member, open_shard, parse_label, read_whole
from wds_convnext.shards.spec import Shard
from wds_convnext.shards.tar import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, Member

_OTHER_FORMATS = ("tif", "tiff", "avif", "heic", "heif", "jxl", "jp2", "ppm", "svg", "npy")
_NUMBERED_PICTURE = re.compile(rf"\d+\.({'|'.join(IMAGE_EXTENSIONS)})")
_MAX_BYTES = 1 << 30  # of an image or a label: 6 bytes for each pixel that one may have
MAX_CLASSES = 1_000_000  # a label beyond it is an identifier, not a class number


@dataclass(frozen=True)
class ScannedSample:
    """One sample as `scan_shard` finds it.

    `error` says why its label cannot be used; the record's label is then -1. `image` is empty
    where images were not asked for.
    """

    members: list[Member]
    record: Record
    image: bytes = b""
    error: DataError | None = None

    @property
    def unused(self) -> list[str]:
        """The extensions of members that are neither its image nor its label."""
        used = {offset for offset, _ in self.record.places}
        return [member.extension for member in self.members if member.offset not in used]

    @property
    def key(self) -> str:
        return self.members[0].key

    @property
    def label(self) -> int:
        return self.record.label


def scan_shard(
    path: str,
    samples: Iterable[list[Member]],
    *,
    label_field: str = "label",
    num_classes: int = MAX_CLASSES,
    images: bool = False,
) -> Iterator[ScannedSample]:
    """Look at each sample of a shard: read its label, and its image if asked for.

    Args:
        samples: the members of each sample, from `walk_tar` or `read_samples`.
        images: also read every image; records then have checksums.
    Raises:
        ShardError: if a sample has no image or label, or the shard does not hold its members.
    """
    file = open_shard(Shard(path, 0))
    try:
        extension = None
        for number, members in enumerate(samples):
            image, label = _image_and_label(path, members)
            for member in (image, label):
                _check_size(path, member)
            if extension not in (None, label.extension):
                raise ShardError(
                    f"{path}: labels in both .cls and .json. Use one of them throughout."
                )
            extension = label.extension
            data = _read_member(file, path, image) if images else b""
            flags = (HAS_CHECKSUM if images else 0) | (JSON_LABEL if extension == "json" else 0)
            value, error = -1, None
            try:
                value = parse_label(_read_member(file, path, label), flags, label_field)
                if not 0 <= value < num_classes:
                    found, value = value, -1
                    advice = f". {OTHER_FIELD}" if extension == "json" else ""
                    raise DataError(f"label {found} is outside the {num_classes:,} classes{advice}")
            except DataError as problem:
                error = DataError(f"{path}, key {members[0].key}: {problem}")
            start = members[0].start
            record = Record(
                start=start,
                checksum=checksum(data, value, number) if images else 0,
                num_bytes=members[-1].end - start,
                image_offset=image.offset - start,
                image_bytes=image.num_bytes,
                label_offset=label.offset - start,
                label_bytes=label.num_bytes,
                label=value,
                flags=flags,
            )
            yield ScannedSample(members, record, data, error)
    finally:
        os.close(file)


def _image_and_label(path: str, members: list[Member]) -> tuple[Member, Member]:
    by_extension = {member.extension: member for member in members}
    image = next((by_extension[e] for e in IMAGE_EXTENSIONS if e in by_extension), None)
    label = next((by_extension[e] for e in LABEL_EXTENSIONS if e in by_extension), None)
    if image is None or label is None:
        expected = "image" if image is None else ".cls or .json label"
        other = next((e for e in by_extension if e in _OTHER_FORMATS), None)
        advice = f" Convert .{other} to JPEG, PNG or WebP." if image is None and other else ""
        raise ShardError(
            f"{path}, key {members[0].key}: no {expected} "
            f"(found {listing('.' + printable(e) for e in by_extension)}). "
            f"Training needs an image and a label in every sample.{advice}"
        )
    for member in members:
        if _NUMBERED_PICTURE.fullmatch(member.extension):
            raise ShardError(
                f"{path}: {member.name} and {image.name} have one key, which ends at the first "
                "dot, so one of the pictures would be dropped. Write names with a single dot."
            )
    return image, label


def _read_member(file: int, path: str, member: Member) -> bytes:
    start = member.offset - BLOCK
    span = read_whole(file, BLOCK + member.num_bytes, start, path=path)
    return cut_member(span, start, (member.offset, member.num_bytes), path=path)


def _check_size(path: str, member: Member) -> None:
    if member.num_bytes >= _MAX_BYTES:
        raise ShardError(
            f"{path}: {member.name} has {member.num_bytes:,} bytes, more than an image or a label "
            f"may have ({_MAX_BYTES:,}). Leave it out, or write it smaller."
        )
