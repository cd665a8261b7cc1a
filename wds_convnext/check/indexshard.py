"""What `index` does to one shard: its samples are checked, its sidecar and records written."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wds_convnext.check.splits import hash_keys
from wds_convnext.errors import DataError, ShardError
from wds_convnext.files import write_atomically
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.index import DECODED, JSON_LABEL
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.sidecar import differing_line, format_sidecar, sidecar_path
from wds_convnext.shards.spec import Shard
from wds_convnext.shards.tar import Member, read_tar
from wds_convnext.storage.layout import held, is_cached, where


@dataclass(frozen=True)
class IndexedShard:
    """What the manifest needs to know of a shard."""

    shard: Shard
    key_hashes: np.ndarray
    highest_label: int
    label_extension: str
    records: bytes
    unused: Counter
    damaged: list[str]


def index_shard(task: tuple[str, str, bool], count: Callable[[int, int], None]) -> IndexedShard:
    """Check a shard (path, label field, whether to decode its images), and write its sidecar."""
    path = task[0]
    with held(path):
        try:
            return _index_shard(task, count)
        except (ShardError, DataError) as error:  # a remote shard is known by its URL
            raise type(error)(str(error).replace(path, where(path))) from None


def _index_shard(task: tuple[str, str, bool], count: Callable[[int, int], None]) -> IndexedShard:
    path, label_field, decode = task
    members, skipped = read_tar(path)
    records, highest, extension, damaged = bytearray(), -1, "cls", []
    unused = Counter(_short_name(name) for name in skipped)
    for sample in scan_shard(path, members, label_field=label_field, images=True):
        if sample.error is not None:
            raise sample.error
        record = sample.record
        if decode:
            try:
                decode_rgb(sample.image)
                record = record._replace(flags=record.flags | DECODED)
            except DataError as error:
                damaged.append(f"{where(path)}, key {sample.key}: {error}")
        records += record.pack()
        highest = max(highest, sample.label)
        extension = "json" if sample.record.flags & JSON_LABEL else "cls"
        unused.update(f".{other}" for other in sample.unused)
    if not is_cached(path):
        _write_sidecar(path, members)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    num_bytes = os.path.getsize(path)
    count(len(members), num_bytes)
    shard = Shard(path, len(members), num_bytes, sha256)
    hashes = hash_keys(members)
    return IndexedShard(shard, hashes, highest, extension, bytes(records), unused, damaged)


def _short_name(name: str) -> str:
    """A file's name in a report; those that macOS writes next to every file are one kind."""
    base = os.path.basename(name)
    return "._*" if base.startswith("._") else base


def _write_sidecar(path: str, samples: list[list[Member]]) -> None:
    sidecar = sidecar_path(path)
    if not os.path.exists(sidecar):
        write_atomically(sidecar, format_sidecar(samples))
        return
    try:
        line = differing_line(sidecar, samples)
    except (ValueError, OSError) as error:
        raise ShardError(
            f"{sidecar}: not readable ({getattr(error, 'strerror', None) or error}). Move it away."
        ) from None
    if line is not None:
        raise ShardError(
            f"{sidecar}: says otherwise than a walk of the tar (line {line}). Move it away; it is "
            "then written."
        )
