"""Proof that shards hold their input: every row, once, with the same bytes and label.

A sample's key is its row's number in the split, so shards are compared with the input in any
order. Of every image 64 bits of its SHA-256 are kept, of both sides: 60 bytes a sample in all.
Of an image that the conversion has shrunk, the digest of its source counts that it has kept.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from wds_convnext.check.problems import Problem, shorten
from wds_convnext.check.splits import ShardSplit
from wds_convnext.conversion.fraction import Fractions, SelectedRows, divide
from wds_convnext.conversion.layout import unit_edges
from wds_convnext.conversion.opening import open_splits
from wds_convnext.conversion.shrink import AS_STORED, SOURCE, digest_image
from wds_convnext.conversion.source import (
    UNLABELLED,
    Opener,
    SourceSplit,
    label_numbers,
    read_rows,
)
from wds_convnext.conversion.staging import read_bad_rows
from wds_convnext.errors import DataError, ShardError, UsageError
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.classes import class_difference
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.sidecar import read_samples
from wds_convnext.shards.spec import Shard, sources_path
from wds_convnext.storage.layout import held

_ROW_KEY = re.compile(r"\d{9}|[1-9]\d{9,17}", re.ASCII)
_NO_ROW = -1

DIGEST = np.dtype([("row", np.int64), ("image", np.uint64), ("label", np.int32)])


def open_inputs(
    source: str,
    openers: dict[str, Opener],
    splits: list[ShardSplit],
    *,
    workers: Workers,
    quiet: bool = False,
) -> dict[str, SourceSplit]:
    """The input of each split of shards that has a manifest.

    Args:
        source: what the input is called.
        openers: its splits.
        workers: hash the images of a split that was divided by fractions.

    Raises:
        UsageError: if a split was not converted, is named in part, or has no files in the source.
    """
    inputs: dict[str, SourceSplit] = {}
    divided: dict[tuple, dict[str, SelectedRows]] = {}
    for split in splits:
        if split.manifest_error or split.is_interrupted:
            continue  # a problem already
        if split.manifest is None:
            raise UsageError(f"{split.manifest_path}: no manifest, so not made by a conversion.")
        if not split.is_whole:
            raise UsageError(f"--against compares whole splits. Name {split.manifest_path}.")
        selection = split.manifest.options.get("selection") or {}
        name = selection.get("of", split.name)
        if name not in openers:
            raise UsageError(
                f"--against {source}: holds the splits {', '.join(openers)}, not {name}. "
                "Name the folder that was converted, or fewer shards."
            )
        image, label = split.manifest.options.get("columns") or (None, None)
        if not selection:
            inputs[name] = openers[name](image=image, label=label)
            continue
        fractions = Fractions(selection["val"], selection["test"])
        if (name, fractions) not in divided:
            base = openers[name](image=image, label=label)
            divided[name, fractions] = divide(base, fractions, workers=workers, quiet=quiet)
        if split.name not in divided[name, fractions]:
            raise UsageError(
                f"--against {source}: by its images' hashes no row of {name} is in {split.name}. "
                "Name the source that was converted."
            )
        inputs[split.name] = divided[name, fractions][split.name]
    return inputs


def splits_without_shards(
    openers: dict[str, Opener], inputs: dict[str, SourceSplit], splits: list[ShardSplit]
) -> dict[str, int]:
    """The labelled splits of the input that are not among those of the shards, and their rows."""
    there = {split.name for split in splits}
    parts = [part for part in inputs.values() if isinstance(part, SelectedRows)]
    rows_of = {name: num for part in parts for name, num in part.parts.items() if num}
    missing = {name: num for name, num in rows_of.items() if name not in there}
    there |= {part.base.name for part in parts}
    stated = [split.manifest.options.get("columns") for split in splits if split.manifest]
    image, label = next(filter(None, stated), (None, None))
    opened, _ = open_splits(openers, image=image, label=label)
    return missing | {split.name: split.num_rows for split in opened if split.name not in there}


def compare_with_input(
    split: ShardSplit, source: SourceSplit, *, workers: Workers, quiet: bool = False
) -> tuple[list[Problem], list[str]]:
    """What differs between the shards of a split and its input, and notes on rows left out.

    Shards that are missing or cannot be read hold nothing here.
    """
    manifest = split.manifest
    assert manifest is not None  # `open_inputs` refuses a split without one
    names = manifest.class_names
    stated = source.class_names
    if stated and (difference := class_difference(names, stated)):
        what = f"its class names are not those of {source.where}: {difference}"
        return [Problem(split.manifest_path, what)], []
    sources = sources_path(split.manifest_path) if "shrink" in manifest.options else None
    if sources and _size_of(sources) != SOURCE.size * len(manifest):
        what = f"missing, or not {SOURCE.size} bytes a sample"
        advice = "what was shrunk cannot be compared. Copy it again, or convert again"
        return [Problem(sources, f"{what}; without it {advice}")], []
    listed = np.array(_rows_left_out(split), np.int64)
    left_out = [row for row in source.rows_with(listed).tolist() if row >= 0]

    paths = [path for path in split.present if path in split.listed]
    firsts = {
        os.path.normpath(shard.path): manifest.numbers_of(number).start
        for number, shard in enumerate(manifest.shards)
    }
    shards = [
        DigestShard(split.listed[path], manifest.label_field, sources, firsts[path])
        for path in paths
    ]
    progress = Progress(f"{split.name}: shards", total=source.num_rows, quiet=quiet)
    found = workers.run(digest_shard, shards, progress=progress)

    edges = unit_edges(source)
    rows = [
        DigestRows(
            source.part(start, stop),
            names,
            start,
            stop,
            frozenset(row for row in left_out if start <= row < stop),
        )
        for start, stop in zip(edges, edges[1:])
    ]
    progress = Progress(f"{split.name}: input", total=source.num_rows, quiet=quiet)
    records = workers.run(digest_rows, rows, progress=progress)
    expected = np.concatenate([np.zeros(0, DIGEST), *(digests for digests, _ in records)])
    usable = [row for _, usable_rows in records for row in usable_rows]
    del records

    problems = shorten(
        [
            Problem(str(_listing(split)), f"leaves out {source.place(row)}, which is usable")
            for row in usable
        ]
    )
    seen = np.zeros(source.num_rows, np.int32)
    for path, digests in zip(paths, found):
        problems += shorten(list(_differences(path, digests, expected, seen, source)))
    missing = np.setdiff1d(np.flatnonzero(seen == 0), left_out)
    if len(missing):
        first = source.place(int(missing[0]))
        what = f"{len(missing):,} rows of the input are in no shard, the first is {first}"
        problems.append(Problem(split.manifest_path, what))
    notes = [f"{len(left_out):,} unusable rows were left out: {_listing(split)}"] * bool(left_out)
    if sources:
        num_shrunk = np.count_nonzero(np.fromfile(sources, "<u8") != AS_STORED)
        notes.append(f"{num_shrunk:,} images were shrunk: compared were the digests in {sources}")
    return problems, notes


def _differences(
    path: str, digests: np.ndarray, expected: np.ndarray, seen: np.ndarray, source: SourceSplit
) -> Iterator[Problem]:
    """Compare one shard's samples with their rows; counts them in `seen`."""
    rows = source.rows_with(digests["row"]).tolist()
    for row, (number, image, label) in zip(rows, digests.tolist()):
        key = f"key {number:09d}"
        if row < 0:
            where = "a key that is no number" if number == _NO_ROW else key
            yield Problem(path, f"{where}: no row of the input, which has {len(expected):,}")
            continue
        seen[row] += 1
        if seen[row] > 1:
            yield Problem(path, f"{key}: comes {seen[row]} times")
        if image != expected["image"][row]:
            yield Problem(path, f"{key}: its image is not that of {source.place(row)}")
        if label != expected["label"][row]:
            stated = expected["label"][row]
            yield Problem(path, f"{key}: label {label}, but {stated} in {source.place(row)}")


def _size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else -1


def _listing(split: ShardSplit) -> Path:
    return Path(split.manifest_path).with_suffix(".bad.jsonl")


def _rows_left_out(split: ShardSplit) -> list[int]:
    """The rows that the conversion could not use, as it listed them."""
    return [entry["row"] for entry in read_bad_rows(_listing(split))]


@dataclass(frozen=True)
class DigestShard:
    """A shard whose samples are to be digested.

    Args:
        sources: the file of the digests of the split's sources, if images were shrunk.
        first: the number of the shard's first sample in the split.
    """

    shard: Shard
    label_field: str
    sources: str | None
    first: int


def digest_shard(task: DigestShard, count: Callable[[int, int], None]) -> np.ndarray:
    """Row, image digest and label of each sample, DIGEST; nothing if the shard is broken."""
    with held(task.shard.path):
        return _digest_shard(task, count)


def _digest_shard(task: DigestShard, count: Callable[[int, int], None]) -> np.ndarray:
    path, digests = task.shard.path, []
    sources = np.full(task.shard.num_samples, AS_STORED, np.uint64)
    if task.sources:
        offset = SOURCE.size * task.first
        sources = np.fromfile(task.sources, "<u8", count=len(sources), offset=offset)
    try:
        samples = scan_shard(path, read_samples(path), label_field=task.label_field, images=True)
        for sample, source in zip(samples, chain(sources.tolist(), repeat(AS_STORED))):
            if sample.error is None:
                image = digest_image(sample.image) if source == AS_STORED else source
                digests.append((_row_of(sample.key), image, sample.label))
            count(1, len(sample.image))
    except ShardError:  # the check of the shard itself has reported it
        pass
    return np.array(digests, dtype=DIGEST)


def _row_of(key: str) -> int:
    return int(key) if _ROW_KEY.fullmatch(key) else _NO_ROW


@dataclass(frozen=True)
class DigestRows:
    """A range of the input's rows that are to be digested; `left_out` are to be checked."""

    source: SourceSplit
    class_names: tuple[str, ...]
    start: int
    stop: int
    left_out: frozenset[int]


def digest_rows(
    task: DigestRows, count: Callable[[int, int], None]
) -> tuple[np.ndarray, list[int]]:
    """Row, image digest and label of each row, DIGEST, and the rows left out that are usable."""
    digests, usable = [], []
    for batch in read_rows(task.source, task.start, task.stop):
        num_bytes = 0
        labels = label_numbers(batch.labels, task.class_names).tolist()
        for row, (image, label) in enumerate(zip(batch.images, labels), start=batch.first_row):
            data = b"" if isinstance(image, DataError) else image
            num_bytes += len(data)
            digests.append((row, digest_image(data), label))
            if row in task.left_out and _is_usable(data, label):
                usable.append(row)
        count(len(batch.images), num_bytes)
    return np.array(digests, dtype=DIGEST), usable


def _is_usable(image: bytes | memoryview, label: int) -> bool:
    try:
        decode_rgb(bytes(image))
    except DataError:
        return False
    return label != UNLABELLED
