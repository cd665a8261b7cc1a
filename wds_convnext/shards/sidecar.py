"""Sidecars: where the members of each sample stand in a tar, so that it need not be walked.

A shard's sidecar `train-000.idx` is in the format of DALI's wds2idx: a line `v1.2 N`, then for
each sample `ext offset size name` per member. Where none is found, one walk over the tar's
headers takes its place.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from wds_convnext.door import MAX_BYTES, read_bounded
from wds_convnext.errors import ShardError
from wds_convnext.shards.headers import BLOCK
from wds_convnext.shards.tar import Member, check_end, read_tar, skip_files

_VERSION = "v1.2"
_MAX_EXTENSION = 1 << 16  # bytes of extension headers before a member, where a sidecar is believed


def sidecar_path(shard_path: str | os.PathLike) -> str:
    """Where the offsets of a shard stand: `train-000.tar` -> `train-000.idx`."""
    return str(shard_path).removesuffix(".tar") + ".idx"


def format_sidecar(samples: list[list[Member]], *, keep_case: bool = False) -> bytes:
    """The text of a sidecar. Whitespace in names, which the format cannot hold, becomes `_`.

    Args:
        keep_case: of extensions, as DALI's own tool does.
    """
    lines = [format_sidecar_line(sample, keep_case=keep_case) for sample in samples]
    return sidecar_head(len(samples)) + b"".join(lines)


def sidecar_head(num_samples: int) -> bytes:
    """The first line of a sidecar."""
    return f"{_VERSION} {num_samples}\n".encode()


def format_sidecar_line(sample: Iterable[Member], *, keep_case: bool = False) -> bytes:
    """The line of one sample in a sidecar."""
    words = []
    for member in sample:
        name = "_".join(member.name.split())
        extension = os.path.basename(name).partition(".")[2]
        extension = extension if keep_case else extension.lower()
        words.append(f"{extension} {member.offset} {member.num_bytes} {name}")
    return " ".join(words).encode("utf-8", "surrogateescape") + b"\n"


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
        if version != _VERSION or len(samples) != int(num_samples):
            raise ValueError(f"{head!r} before {len(samples)} samples")
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(
            f"{path}: not a whole sidecar of version {_VERSION} ({reason}). "
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


def differing_line(path: str | os.PathLike, samples: list[list[Member]]) -> int | None:
    """The first line of a sidecar that is not what a walk of its tar gives, counted from 1.

    In a sidecar of DALI's own the case of extensions may be kept.

    Raises:
        ValueError, OSError: as `read_bounded`.
    """
    found, expected = read_bounded(path), format_sidecar(samples)
    if found in (expected, format_sidecar(samples, keep_case=True)):
        return None
    lines = list(zip(found.splitlines(), expected.splitlines()))
    return next((i for i, (a, b) in enumerate(lines, start=1) if a != b), len(lines) + 1)


def may_hold(path: str, name: str) -> bool:
    """Whether a shard may have a member of which this is a part of the name; False is sure."""
    with suppress(OSError, ValueError):
        return name.encode("utf-8", "surrogateescape") in read_bounded(sidecar_path(path))
    return True


def read_samples(path: str) -> list[list[Member]]:
    """The members of each sample of a shard: from its sidecar, else by walking the tar.

    Raises:
        ShardError: if the tar is damaged, or does not end where its sidecar says.
    """
    sidecar = sidecar_path(path)
    if not os.path.isfile(sidecar):
        return read_tar(path)[0]
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
    check_end(path, skip_files(path, end))
    return samples
