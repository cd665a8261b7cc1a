"""Manifest, sidecars and index for shards that others made, so that training starts and checks."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from wds_convnext.check.indexremote import find_splits, keep_fetched
from wds_convnext.check.indexshard import IndexedShard, index_shard
from wds_convnext.check.splits import (
    ShardSplit,
    find_duplicate_keys,
)
from wds_convnext.config import IndexConfig
from wds_convnext.door import parse_json, read_bounded
from wds_convnext.engine import open_engine
from wds_convnext.errors import ShardError, UsageError, WdsConvnextError, listing
from wds_convnext.files import write_atomically
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.index import index_content
from wds_convnext.shards.naming import is_held_out
from wds_convnext.shards.sidecar import sidecar_path
from wds_convnext.shards.spec import Shard, index_path, total_bytes
from wds_convnext.storage.cache import caching
from wds_convnext.storage.layout import where


@dataclass(frozen=True)
class IndexReport:
    """The manifests that were written, by path, and what of their shards is not used.

    `unused` counts extensions of members (`.txt`) and names of files that belong to no sample.
    `damaged` names samples whose image does not decode, and the reason, if that was looked at.
    """

    manifests: dict[str, Dataset]
    unused: dict[str, Counter]
    damaged: dict[str, list[str]]
    seconds: float

    def __str__(self) -> str:
        lines = []
        for path, manifest in self.manifests.items():
            num_bytes = total_bytes(manifest.shards)
            lines.append(
                f"{path}: {len(manifest):,} samples, {len(manifest.class_names)} classes, "
                f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}, "
                f"{num_bytes / 1e6:,.1f} MB"
            )
            unused = [f"{name} {number:,}" for name, number in self.unused[path].most_common()]
            if unused:
                lines.append(f"  not used: {listing(unused)}")
            if damaged := self.damaged[path]:
                lines.append(f"  do not decode: {len(damaged):,}, the first is {damaged[0]}")
        lines.append(f"{self.seconds:.1f} s")
        for path in self.manifests:
            if not is_held_out(Path(path).stem):
                return "\n".join([*lines, f"next: wds-convnext train --shards {quote(path)}"])
        return "\n".join(lines)

    def to_json(self) -> dict:
        return {
            path: {
                "num_samples": len(manifest),
                "num_shards": len(manifest.shards),
                "num_classes": len(manifest.class_names),
                "unused": dict(self.unused[path]),
                **({"damaged": self.damaged[path]} if self.damaged[path] else {}),
            }
            for path, manifest in self.manifests.items()
        }


def index(
    spec: str,
    config: IndexConfig | None = None,
    *,
    executor: Executor | None = None,
    quiet: bool = False,
    **options: Any,
) -> IndexReport:
    """Write a sidecar for each shard, and an index and a manifest for each split that a spec names.

    The shards themselves are left as they are. Sidecars and manifests that are there must fit. Of
    shards at URLs each is fetched once through the cache (twice where the connection checks
    nothing, since nothing says yet what it should be); index and manifest, which names the URLs,
    go to the folder `out`, and there are no sidecars.

    Args:
        spec: as for training; a folder stands for all splits in it.
        config: where labels and class names stand.
        executor: runs the work in place of processes of this machine.
        options: fields of `IndexConfig` by name: `label_field="class", class_names="names.txt"`.
            By default there is a process per CPU core, so that a script has to call this under
            `if __name__ == "__main__":`, or with `jobs=1`.
    Raises:
        ShardError: if a shard is damaged, a key comes twice, a sample lacks its image or label,
            or a sidecar says otherwise than its shard.
        DataError: if a label is no class number.
        UsageError: if a manifest lists other shards, or there are more classes than names.
    """
    config = IndexConfig.of(config, options)
    with caching(config):
        return _index(spec, config, executor, quiet=quiet)


def _index(
    spec: str, config: IndexConfig, executor: Executor | None, *, quiet: bool
) -> IndexReport:
    started = time.monotonic()
    label_field = config.label_field
    class_names = read_class_names(config.class_names) if config.class_names else None
    is_shared = config.engine is not None or executor is not None
    splits = find_splits(spec, config.out, is_shared=is_shared)
    for split in splits:
        if split.manifest_error:
            raise split.manifest_error
        if os.path.exists(split.manifest_path) and not split.manifest:
            raise UsageError(
                f"{split.manifest_path}: not written by this tool, so it is not replaced. "
                "Move it away; the manifest is then written in its place."
            )
        absent = sorted({*split.paths, *split.listed} - set(split.present))
        if absent or split.is_interrupted:
            raise ShardError(
                f"{listing(absent, limit=5) or split.manifest_path}: missing. An index of what is "
                "left would make the loss look complete: copy or write the shards again."
            )
        if split.manifest and set(split.paths) != set(split.listed):
            extra = sorted(set(split.paths) - set(split.listed))
            raise UsageError(
                f"{split.manifest_path}: lists other shards than are named"
                f"{f' ({extra[0]})' if extra else ''}. Name the manifest, or move it away."
            )
    with _leaving_nothing(splits):
        with (
            open_engine(config.engine, executor) as engine,
            Workers(config.jobs, executor=engine) as workers,
        ):
            decode = config.check == "decode"
            indexed = [_index_split(s, label_field, decode, workers, quiet) for s in splits]
        names = _name_classes([shard for shards in indexed for shard in shards], class_names)
        manifests = {
            split.manifest_path: _make_manifest(split, shards, label_field, names)
            for split, shards in zip(splits, indexed)
        }
        for (path, manifest), shards in zip(manifests.items(), indexed):
            paths = [shard.name for shard in manifest.shards]
            records = (shard.records for shard in shards)
            content = index_content(records, paths, manifest.shards, checksums=True)
            write_atomically(index_path(path), content)
            manifest.write_manifest(path)  # last: its presence means that all is there
    if config.out is not None:
        with contextlib.suppress(OSError):  # a full disk, say: it only spares fetching them again
            keep_fetched(manifests)
    unused = {
        path: sum((shard.unused for shard in shards), Counter())
        for path, shards in zip(manifests, indexed)
    }
    damaged = {
        path: [line for shard in shards for line in shard.damaged]
        for path, shards in zip(manifests, indexed)
    }
    return IndexReport(manifests, unused, damaged, time.monotonic() - started)


@contextlib.contextmanager
def _leaving_nothing(splits: list[ShardSplit]) -> Iterator[None]:
    """Remove what was written of these splits if not all of it can be."""
    written = [sidecar_path(path) for split in splits for path in split.paths]
    written += [index_path(split.manifest_path) for split in splits]
    written += [split.manifest_path for split in splits]
    new = [path for path in written if not os.path.lexists(path)]
    try:
        yield
    except BaseException as error:
        for path in reversed(new):  # the manifest first: its presence means that all is there
            with contextlib.suppress(OSError):
                os.unlink(path)
        if isinstance(error, OSError):
            raise WdsConvnextError(f"{error.filename}: {error.strerror}.") from None
        raise


def read_class_names(path: str) -> tuple[str, ...]:
    """The class names in a text file, one per line or as a JSON list, the first for label 0.

    Raises:
        UsageError: if it cannot be read, or a name is empty.
    """
    try:
        text = read_bounded(path).decode("utf-8-sig")
        is_json = text.lstrip()[:1] in ("[", "{")
        names = parse_json(text, lambda value: "") if is_json else text.splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--class-names {path}: not a readable text file ({error}).") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f'--class-names {path}: JSON, but not a list of names. Write ["ant", "bee"], or '
            "one name per line."
        )
    stripped = tuple(map(str.strip, names))
    if not all(stripped):
        raise UsageError(f"--class-names {path}: line {stripped.index('') + 1} is empty.")
    return stripped


def _index_split(
    split: ShardSplit, label_field: str, decode: bool, workers: Workers, quiet: bool
) -> list[IndexedShard]:
    progress = Progress(f"{split.name}: index", quiet=quiet)
    if split.manifest:
        label_field = split.manifest.label_field
    tasks = [(path, label_field, decode) for path in split.paths]
    indexed = workers.run(index_shard, tasks, progress=progress)
    for shard in indexed:
        _compare_with_manifest(shard.shard, split)
    if not any(shard.shard.num_samples for shard in indexed):
        raise ShardError(f"{split.manifest_path}: its shards hold no samples. Write them again.")
    repeated = find_duplicate_keys(list(split.paths), [shard.key_hashes for shard in indexed])
    if repeated:
        key, holders = repeated[0]
        raise ShardError(
            f"{where(holders[1])}: the key {key} is also in {where(holders[0])}. Keys must be "
            "unique in a split: write the shards again with other keys."
        )
    return indexed


def _compare_with_manifest(shard: Shard, split: ShardSplit) -> None:
    """Refuse a shard that is not the one that its manifest lists."""
    listed = split.listed.get(shard.path)
    if listed is None:
        return
    for what in ("num_bytes", "sha256", "num_samples"):
        found, stated = getattr(shard, what), getattr(listed, what)
        if stated is not None and found != stated:
            raise ShardError(
                f"{shard.path}: {what} is {found}, but {split.manifest_path} says {stated}. "
                "Copy the shard again, or write it again."
            )


def _name_classes(
    indexed: list[IndexedShard], class_names: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The given names, or a number for each class, over all splits."""
    num_classes = 1 + max((shard.highest_label for shard in indexed), default=-1)
    if class_names is None:
        return tuple(map(str, range(num_classes)))
    if len(class_names) < num_classes:
        raise UsageError(
            f"--class-names: {len(class_names)} names, but labels up to {num_classes - 1}. "
            "Give one name per line, the first for label 0."
        )
    return class_names


def _make_manifest(
    split: ShardSplit,
    indexed: list[IndexedShard],
    label_field: str,
    class_names: tuple[str, ...],
) -> Dataset:
    if split.manifest:
        return split.manifest
    uses_json = any(shard.label_extension == "json" for shard in indexed)
    return Dataset(
        name=Path(split.manifest_path).absolute().parent.name,
        split=split.name,
        shards=tuple(shard.shard for shard in indexed),
        class_names=class_names,
        options={"label_field": label_field} if uses_json else {},
    )
