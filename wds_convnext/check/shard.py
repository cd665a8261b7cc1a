"""Everything that one shard can be checked for without the others."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from wds_convnext.check.problems import Problem, shorten
from wds_convnext.check.splits import hash_keys
from wds_convnext.errors import DataError, ShardError
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.index import HAS_CHECKSUM, Record, open_index
from wds_convnext.shards.scan import ScannedSample, scan_shard
from wds_convnext.shards.sidecar import differing_line, sidecar_path
from wds_convnext.shards.spec import Shard, check_sha256, check_size
from wds_convnext.shards.tar import Member, read_tar
from wds_convnext.storage.layout import held


@dataclass(frozen=True)
class CheckShard:
    """A shard to check. Without a manifest only `shard.path` counts."""

    shard: Shard
    is_listed: bool
    num_classes: int
    label_field: str
    deep: bool
    index_path: str


@dataclass(frozen=True)
class ShardFindings:
    """What was found in one shard."""

    num_bytes: int
    num_samples: int = 0
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    problems: tuple[Problem, ...] = ()


def check_shard(task: CheckShard, count: Callable[[int, int], None]) -> ShardFindings:
    """Everything that one shard can be checked for without the others."""
    with held(task.shard.path):
        return _check_shard(task, count)


def _check_shard(task: CheckShard, count: Callable[[int, int], None]) -> ShardFindings:
    path = task.shard.path
    problems, num_bytes = [], 0
    try:
        num_bytes = os.path.getsize(path)
        check_size(task.shard)
        check_sha256(task.shard)
        count(0, num_bytes)
    except ShardError as error:
        problems.append(Problem.of(path, error))
    except OSError as error:
        problems.append(Problem(path, f"not readable ({error.strerror})"))
    try:
        samples, _ = read_tar(path)
    except ShardError as error:
        problems.append(Problem.of(path, error))
        return ShardFindings(num_bytes, problems=tuple(problems))
    if task.is_listed and len(samples) != task.shard.num_samples:
        stated = task.shard.num_samples
        problems.append(Problem(path, f"{len(samples)} samples, but its manifest says {stated}"))
    problems += _compare_sidecar(path, samples)
    problems += shorten(list(_check_samples(task, samples, count)))
    return ShardFindings(num_bytes, len(samples), hash_keys(samples), tuple(problems))


def _compare_sidecar(path: str, samples: list[list[Member]]) -> list[Problem]:
    sidecar = sidecar_path(path)
    if not os.path.isfile(sidecar):
        return []
    try:
        line = differing_line(sidecar, samples)
    except (ValueError, OSError) as error:
        return [Problem(sidecar, f"not readable ({getattr(error, 'strerror', None) or error})")]
    if line is None:
        return []
    what = f"line {line} is not what a walk of the tar gives. Delete it"
    return [Problem(sidecar, what)]


def _check_samples(
    task: CheckShard, samples: list[list[Member]], count: Callable
) -> Iterator[Problem]:
    """Read every sample, compare it with its record in the index, and decode it if asked for."""
    path = task.shard.path
    records = _indexed_records(task)
    if isinstance(records, Problem):
        yield records
        records = None
    try:
        scanned = scan_shard(
            path,
            samples,
            label_field=task.label_field,
            num_classes=task.num_classes,
            images=task.deep or records is not None,
        )
        for number, sample in enumerate(scanned):
            if sample.error is not None:
                yield Problem.of(path, sample.error)
            elif task.deep:
                try:
                    decode_rgb(sample.image)
                except DataError as error:
                    yield Problem(path, f"key {sample.key}: {error}")
            if records is not None and not _fits(sample, Record(*records[number].tolist())):
                what = f"its record of {path}, key {sample.key}, is not what the tar holds"
                yield Problem(task.index_path, f"{what}. Run wds-convnext index")
            count(1, 0)
    except ShardError as error:  # the next samples would say the same
        yield Problem.of(path, error)


def _indexed_records(task: CheckShard) -> np.ndarray | Problem | None:
    """What the index holds of a shard; None without an index."""
    if not (task.is_listed and os.path.exists(task.index_path)):
        return None
    file = open_index(task.index_path)
    if file is None:
        return Problem(task.index_path, "not a whole index. Delete it, it is made again")
    place = file.find(task.shard)
    if place is None:
        what = f"made from another {task.shard.path}. Delete it, it is made again"
        return Problem(task.index_path, what)
    return file.records(*place)


def _fits(sample: ScannedSample, record: Record) -> bool:
    """Whether a record says what was found in the tar."""
    found = sample.record
    if found.label != record.label or (found.places != record.places):
        return False
    return not record.flags & HAS_CHECKSUM or found.checksum == record.checksum
