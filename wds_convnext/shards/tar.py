"""The samples of a tar file, by a walk over its headers: which members, and where they stand."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from wds_convnext.errors import ShardError, listing
from wds_convnext.files import read_at
from wds_convnext.shards.headers import (
    BLOCK,
    Header,
    announced_bytes,
    end_of,
    header_name,
    walk_headers,
)
from wds_convnext.shards.sniff import sniff

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
LABEL_EXTENSIONS = ("cls", "json")
# As in webdataset: key, dot, extension. Hidden files and `__meta__` entries are no members.
_NAME_OF_SAMPLE = re.compile(r"(?!__[^/]*__($|/))(.*/)?[^./]+\.[^/]+$", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its data starts and how many bytes it has.

    `start` is where its header starts, or the extension header before it that holds a long name.
    """

    name: str
    offset: int
    num_bytes: int
    start: int = field(default=-1, compare=False)

    def __post_init__(self) -> None:
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


def read_tar(path: str) -> tuple[list[list[Member]], list[str]]:
    """The members of each sample of a tar, and the names of the files that belong to none.

    Raises:
        ShardError: as `walk_tar`; also if an image or a label is a link, or if there are files, but
            no sample.
    """
    skipped: list[Header] = []
    samples = list(walk_tar(path, skipped))
    for header in skipped:
        kind = header.name.rpartition(".")[2].lower()
        is_of_sample = _NAME_OF_SAMPLE.match(header.name) and not header.is_file
        if is_of_sample and kind in IMAGE_EXTENSIONS + LABEL_EXTENSIONS:
            raise ShardError(
                f"{path}: {header.name} is a link or a device, so its data is not in its place. "
                "Write the tar with the files themselves (tar --dereference --hard-dereference)."
            )
    names = [header.name for header in skipped]
    if skipped and not samples:
        raise ShardError(
            f"{path}: none of its {len(names):,} files belongs to a sample "
            f"({listing(names, limit=3)}). Write members as KEY.jpg and KEY.cls."
        )
    return samples, names


def walk_tar(path: str, skipped: list[Header] | None = None) -> Iterator[list[Member]]:
    """The members of each sample of a tar, in order.

    Args:
        skipped: gets what else there is, but for folders.
    Raises:
        ShardError: if the tar is cut short or damaged, or a key comes back after another.
    """
    seen, sample = set[str](), list[Member]()
    for member in _members(path, [] if skipped is None else skipped):
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


def _members(path: str, skipped: list[Header]) -> Iterator[Member]:
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
                elif not header.is_folder:
                    skipped.append(header)
    except (ValueError, OSError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from None
    check_end(path, end)


def _unreadable(path: str, reason: str) -> ShardError:
    """The error for a file that is no tar: what it is instead, if its first bytes say so."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if other := sniff(file.read(64)):
            return ShardError(f"{path}: not a tar file, but {other[0]}. {other[1]}.")
    return ShardError(
        f"{path}: not a readable tar file ({reason}). Copy the shard again, or write it again."
    )


def check_end(path: str, end: int) -> None:
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


def skip_files(path: str, end: int) -> int:
    """Where the files end that follow the last sample and belong to none: a license, a folder."""
    after = end
    if end > os.path.getsize(path):
        return end
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        for header in walk_headers(
            lambda num_bytes, at: read_at(file.fileno(), num_bytes, end + at)
        ):
            if not header.is_folder and _NAME_OF_SAMPLE.match(header.name):
                break
            after = end + header.end
    return after


def read_members(span: bytes, start: int) -> list[Member]:
    """The members whose headers and data a piece of a tar holds, from byte `start` of the tar on.

    Raises:
        ShardError: if the piece does not begin with a header, or a header is damaged.
    """
    members, at = [], 0
    while at < len(span):
        header = span[at : at + BLOCK]
        name, num_bytes = _plain_name(header), announced_bytes(header)
        # A long name, a folder, a link: nothing that our own writer writes.
        if name is None or num_bytes is None:
            return _read_any_members(span, start)
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
