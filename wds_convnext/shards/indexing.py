"""Making an index where none is there that fits: from sidecars, or by walking the tars, once."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from wds_convnext.errors import ShardError
from wds_convnext.files import replacing
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.index import MAGIC, IndexFile, encode_footer, open_index
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.spec import Shard, check_size
from wds_convnext.shards.tar import read_samples

_SHARDS_AT_A_TIME = 256  # whose records are in memory together


def find_index(
    shards: Sequence[Shard],
    *,
    beside: str,
    is_whole: bool,
    label_field: str,
    jobs: int,
    quiet: bool,
) -> IndexFile:
    """The index that was made from these shards, perhaps among others; a new one if there is none.

    A new one is written to `beside` if the shards are all that a manifest lists, else, or if that
    folder is read-only, to a cache folder; where that cannot be, it is held in memory.

    Raises:
        ShardError: if a shard is missing or damaged, or holds another number of samples.
    """
    cached = cache_path(shards)
    for path in (beside, cached):
        file = open_index(path)
        if file is not None and all(file.find(shard) for shard in shards):
            return file
    for path in [beside] * is_whole + [cached]:
        folder = os.path.dirname(os.path.abspath(path))
        with contextlib.suppress(OSError):
            if path == cached:
                os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK):
                paths = [os.path.relpath(os.path.abspath(s.path), folder) for s in shards]
                pieces = _pieces(shards, paths, label_field, jobs, quiet)
                write_pieces(path, pieces)
                return IndexFile(path)
    paths = [os.path.abspath(shard.path) for shard in shards]
    return IndexFile(cached, b"".join(_pieces(shards, paths, label_field, jobs, quiet)))


def cache_path(shards: Sequence[Shard]) -> str:
    """Where the index of shards stands that have no place of their own."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    names = "\0".join(os.path.abspath(shard.path) for shard in shards)
    key = hashlib.sha256(os.fsencode(names)).hexdigest()[:24]
    return os.path.join(base, "wds_convnext", f"{key}.index")


def write_pieces(path: str, pieces: Iterable[bytes]) -> None:
    """Write a file piece by piece, so that it is either whole or as it was."""
    with replacing(path) as file:
        file.writelines(pieces)


def _pieces(
    shards: Sequence[Shard], paths: Sequence[str], label_field: str, jobs: int, quiet: bool
) -> Iterator[bytes]:
    """The content of an index file; a few shards at a time, so memory stays flat."""
    yield MAGIC
    counted = []
    with Workers(min(jobs, len(shards))) as workers:
        for start in range(0, len(shards), _SHARDS_AT_A_TIME):
            some = shards[start : start + _SHARDS_AT_A_TIME]
            tasks = [(shard, label_field) for shard in some]
            expected = sum(max(0, shard.num_samples) for shard in some)
            progress = Progress("reading labels", total=expected, quiet=quiet)
            for shard, (num_samples, records) in zip(
                some, workers.run(index_records, tasks, progress=progress)
            ):
                counted.append(replace(shard, num_samples=num_samples))
                yield records
    yield encode_footer(paths, counted, checksums=False)


def index_records(task: tuple[Shard, str], count: Callable[[int, int], None]) -> tuple[int, bytes]:
    """The number of samples of a shard, and their records, without checksums."""
    shard, label_field = task
    check_size(shard)
    samples = read_samples(shard.path)
    if shard.num_samples not in (-1, len(samples)):
        raise ShardError(
            f"{shard.path}: it has {len(samples)} samples, expected {shard.num_samples}. "
            "Delete the .idx next to it, or run make shards."
        )
    records = bytearray()
    for sample in scan_shard(shard.path, samples, label_field=label_field):
        if sample.error and shard.num_samples == -1:
            raise sample.error  # without a manifest the classes are counted from the labels
        records += sample.record.pack()
    count(len(samples), len(records))
    return len(samples), bytes(records)
