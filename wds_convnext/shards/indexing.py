"""Making an index where none is there that fits: from sidecars, or by walking the tars, once."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from wds_convnext.errors import ShardError
from wds_convnext.files import write_atomically
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.index import IndexFile, index_content, open_index
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.sidecar import read_samples
from wds_convnext.shards.spec import Shard, check_size

_SHARDS_AT_A_TIME = 256  # whose records are in memory together


def find_index(
    shards: Sequence[Shard],
    *,
    index_at: str,
    is_whole: bool,
    label_field: str,
    jobs: int,
    quiet: bool,
) -> IndexFile:
    """The index that was made from these shards, perhaps among others; a new one if there is none.

    A new one is written to `index_at` if the shards are all that a manifest lists, else, or if that
    folder is read-only, to a cache folder; where that cannot be, it is held in memory.

    Raises:
        ShardError: if a shard is missing or damaged, or holds another number of samples.
    """
    cached = cache_path(shards)
    for path in (index_at, cached):
        file = open_index(path)
        if file is not None and all(file.find(shard) for shard in shards):
            return file
    for path in [index_at] * is_whole + [cached]:
        folder = os.path.dirname(os.path.abspath(path))
        with contextlib.suppress(OSError):
            if path == cached:
                os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK):
                paths = [os.path.relpath(os.path.abspath(s.path), folder) for s in shards]
                write_atomically(path, _content(shards, paths, label_field, jobs, quiet))
                return IndexFile(path)
    paths = [os.path.abspath(shard.path) for shard in shards]
    return IndexFile(cached, b"".join(_content(shards, paths, label_field, jobs, quiet)))


def cache_path(shards: Sequence[Shard]) -> str:
    """Where the index of shards stands that have no place of their own."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    names = "\0".join(os.path.abspath(shard.path) for shard in shards)
    key = hashlib.sha256(os.fsencode(names)).hexdigest()[:24]
    return os.path.join(base, "wds_convnext", f"{key}.index")


def _content(
    shards: Sequence[Shard], paths: Sequence[str], label_field: str, jobs: int, quiet: bool
) -> Iterator[bytes]:
    """The content of an index file; a few shards at a time, so memory stays flat."""
    counted = []

    def records() -> Iterator[bytes]:
        with Workers(min(jobs, len(shards))) as workers:
            for start in range(0, len(shards), _SHARDS_AT_A_TIME):
                some = shards[start : start + _SHARDS_AT_A_TIME]
                tasks = [(shard, label_field) for shard in some]
                total = sum(max(0, shard.num_samples) for shard in some)
                title = f"index: shards {start + 1} to {start + len(some)} of {len(shards)}"
                progress = Progress(title, total=total, quiet=quiet)
                done = workers.run(index_records, tasks, progress=progress)
                for shard, (num_samples, packed) in zip(some, done):
                    counted.append(replace(shard, num_samples=num_samples))
                    yield packed

    return index_content(records(), paths, counted, checksums=False)


def index_records(task: tuple[Shard, str], count: Callable[[int, int], None]) -> tuple[int, bytes]:
    """The number of samples of a shard, and their records, without checksums."""
    shard, label_field = task
    check_size(shard)
    samples = read_samples(shard.path)
    if shard.num_samples not in (-1, len(samples)):
        raise ShardError(
            f"{shard.path}: it has {len(samples)} samples, expected {shard.num_samples}. "
            "Delete the .idx next to it, or write the shard again."
        )
    records = bytearray()
    for sample in scan_shard(shard.path, samples, label_field=label_field):
        if sample.error and shard.num_samples == -1:
            raise sample.error  # without a manifest the classes are counted from the labels
        records += sample.record.pack()
    count(len(samples), len(records))
    return len(samples), bytes(records)
