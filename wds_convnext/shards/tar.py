"""Where each sample stands in its tar file: walking tars, sidecars, offsets.

A shard's sidecar `train-000.idx` is in the format of DALI's wds2idx: a line `v1.2 N`, then for
each sample `ext offset size name` per member. Where none is found, one walk over the tar's
headers takes its place.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from wds_convnext.door import MAX_BYTES, read_bounded
from wds_convnext.errors import ShardError
from wds_convnext.files import read_at
from wds_convnext.shards.headers import (
    BLOCK,
    announced_bytes,
    end_of,
    header_name,
    walk_headers,
)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
LABEL_EXTENSIONS = ("cls", "json")
_SIDECAR_VERSION = "v1.2"
# As in webdataset: key, dot, extension. Hidden files and `__meta__` entries are no members.
_NAME_OF_SAMPLE = re.compile(r"(?!__[^/]*__($|/))(.*/)?[^./]+\.[^/]+$", re.DOTALL)
_MAX_EXTENSION = 1 << 16  # bytes of extension headers before a member, where a sidecar is believed


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its data starts and how many bytes it has.

    `start` is where its header starts, or the extension header before it that holds a long name.
    """

    name: str
    offset: int
    num_bytes: int
    start: int = field(default=-1, compare=False)

    def __post_init__(self):
        if self.start < 0:
            object.__setattr__(self, "start", self.offset - BLOCK)

    @property
    def end(self) -> int:
        """Where its last block ends."""
        return end_of(self.offset, self.num_bytes)

    @property
    def key(self) -> str:
        """The sample it belongs to: its name up to the first dot of the base name."""
        folder, base = os.path.split(self.name)
        return os.path.join(folder, base.split(".", 1)[0])

    @property
    def extension(self) -> str:
        return os.path.basename(self.name).partition(".")[2].lower()


def walk_tar(path: str) -> Iterator[list[Member]]:
    """The members of each sample of a tar, in order.

    Raises:
        ShardError: if the tar is cut short or damaged, or a key comes back after another.
    """
    seen, sample = set(), []
    for member in _members(path):
        if sample and member.key != sample[0].key:
            yield sample
            sample = []
        if not sample:
            if member.key in seen:
                raise ShardError(
                    f"{path}: the key {member.key} comes twice. Keys must be unique in a shard, "
                    "and the members of a sample must stand together."
                )
            seen.add(member.key)
        if member.extension in {other.extension for other in sample}:
            raise ShardError(
                f"{path}, key {member.key}: more than one .{member.extension} member. "
                "Write the shard again."
            )
        sample.append(member)
    if sample:
        yield sample


def _members(path: str) -> Iterator[Member]:
    end = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < BLOCK:
                raise ValueError(f"it has {size} bytes")
            for header in walk_headers(partial(read_at, file.fileno())):
                end = header.end
                if end > size:
                    break
                if header.is_file and _NAME_OF_SAMPLE.match(header.name):
                    yield Member(header.name, header.offset, header.num_bytes, header.start)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(
            f"{path}: not a readable tar file ({reason}). Copy the shard again, or write it again."
        ) from None
    _check_end(path, end)


def _check_end(path: str, end: int) -> None:
    """Check that a tar ends at a byte: from there on at least one block of zeros, nothing else."""
    size = os.path.getsize(path)
    if end + BLOCK > size:
        raise ShardError(
            f"{path}: cut short: {size:,} bytes, without the end-of-archive mark that is due at "
            f"byte {end:,}. Copy the shard, and its .idx if it has one, or write it again."
        )
    with open(path, "rb") as file:
        file.seek(end)
        while rest := file.read(1 << 20):
            if rest.strip(b"\0"):
                raise ShardError(
                    f"{path}: damaged, or more than its index knows: no end of the archive at "
                    f"byte {end:,}. Delete its .idx if it has one, or write the shard again."
                )


def sidecar_path(shard_path: str | os.PathLike) -> str:
    """Where the offsets of a shard stand: `train-000.tar` -> `train-000.idx`."""
    return str(shard_path).removesuffix(".tar") + ".idx"


def format_sidecar(samples: list[list[Member]]) -> bytes:
    """The text of a sidecar. Whitespace in names, which the format cannot hold, becomes `_`."""
    return sidecar_head(len(samples)) + b"".join(map(format_sidecar_line, samples))


def sidecar_head(num_samples: int) -> bytes:
    """The first line of a sidecar."""
    return f"{_SIDECAR_VERSION} {num_samples}\n".encode()


def format_sidecar_line(sample: Iterable[Member]) -> bytes:
    """The line of one sample in a sidecar."""
    members = [Member("_".join(m.name.split()), m.offset, m.num_bytes) for m in sample]
    line = " ".join(f"{m.extension} {m.offset} {m.num_bytes} {m.name}" for m in members)
    return line.encode("utf-8", "surrogateescape") + b"\n"


def read_sidecar(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> list[list[Member]]:
    """The members of each sample, as a sidecar states them.

    Args:
        max_bytes: of the sidecar; what it lists takes ten times as much memory.
    Raises:
        ShardError: if it is not a whole sidecar of version 1.2.
    """
    try:
        text = read_bounded(path, max_bytes=max_bytes).decode("utf-8", "surrogateescape")
        head, *lines = text.splitlines()
        version, num_samples = head.split()
        samples = [_parse_sidecar_line(line.split()) for line in lines]
        if version != _SIDECAR_VERSION or len(samples) != int(num_samples):
            raise ValueError(f"{head!r} before {len(samples)} samples")
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(
            f"{path}: not a whole sidecar of version {_SIDECAR_VERSION} ({reason}). "
            "Delete it (it is then made from the tar), or write the shards again."
        ) from None
    return samples


def _parse_sidecar_line(fields: list[str]) -> list[Member]:
    if not fields or len(fields) % 4:
        raise ValueError(f"{len(fields)} fields in a line, not 4 per member")
    return [
        Member(fields[i + 3], int(fields[i + 1]), int(fields[i + 2]))
        for i in range(0, len(fields), 4)
    ]


def read_samples(path: str) -> list[list[Member]]:
    """The members of each sample of a shard: from its sidecar, else by walking the tar.

    Raises:
        ShardError: if the tar is damaged, or does not end where its sidecar says.
    """
    sidecar = sidecar_path(path)
    if not os.path.isfile(sidecar):
        return list(walk_tar(path))
    try:
        # No sidecar of many samples is as long as its tar, where each has a block for its header.
        samples = read_sidecar(sidecar, max_bytes=max(os.path.getsize(path), 1 << 20))
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}. Copy the shard again.") from None
    end = 0
    for sample in samples:
        if sample[0].start - end <= _MAX_EXTENSION:  # the headers of a long name, perhaps
            sample[0] = replace(sample[0], start=end)
        for member in sample:
            if member.offset < end + BLOCK or member.num_bytes < 0:
                raise ShardError(
                    f"{sidecar}: {member.name} at byte {member.offset:,} overlaps what stands "
                    "before it. Delete the sidecar (it is then made from the tar)."
                )
            end = member.end
    _check_end(path, end)
    return samples


def read_members(span: bytes, start: int) -> list[Member]:
    """The members whose headers and data a piece of a tar holds, from byte `start` of the tar on.

    Raises:
        ShardError: if the piece does not begin with a header, or a header is damaged.
    """
    members, at = [], 0
    while at < len(span):
        name = _plain_name(span[at : at + BLOCK])
        if name is None:  # a long name, a folder, a link: nothing that our own writer writes
            return _read_any_members(span, start)
        num_bytes = announced_bytes(span[at : at + BLOCK])
        if _NAME_OF_SAMPLE.match(name):
            members.append(Member(name, start + at + BLOCK, num_bytes))
        at = end_of(at + BLOCK, num_bytes)
    return members


def is_plain_member(header: bytes) -> bool:
    """Whether a block is the whole header of a regular file that can belong to a sample."""
    name = _plain_name(header)
    return name is not None and _NAME_OF_SAMPLE.match(name) is not None


def _read_any_members(span: bytes, start: int) -> list[Member]:
    try:
        return [
            Member(header.name, start + header.offset, header.num_bytes, start + header.start)
            for header in walk_headers(lambda num_bytes, at: span[at : at + num_bytes])
            if header.is_file and _NAME_OF_SAMPLE.match(header.name)
        ]
    except ValueError as error:
        raise ShardError(f"byte {start:,}: not the header of a tar member ({error})") from None


def _plain_name(header: bytes) -> str | None:
    """The name in the header of a regular file; None for every other header."""
    if header[156:157] not in (b"0", b"\0") or announced_bytes(header) is None:
        return None
    return header_name(header)
