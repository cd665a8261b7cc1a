"""Opening splits: the data set that a spec names, and the two of a training."""

import os
import re
from dataclasses import replace
from functools import lru_cache

from wds_convnext.errors import ShardError
from wds_convnext.shards.classes import class_difference, with_classes
from wds_convnext.shards.dataset import Dataset, read_manifest
from wds_convnext.shards.expand import expand_shards, find_counterpart
from wds_convnext.shards.index import IndexFile, SampleIndex
from wds_convnext.shards.indexing import find_index
from wds_convnext.shards.naming import split_of
from wds_convnext.shards.remote import serve
from wds_convnext.shards.scan import MAX_CLASSES
from wds_convnext.shards.spec import (
    Shard,
    check_size,
    index_path,
    is_manifest,
    manifest_path,
    staging_path,
)


def open_dataset(
    spec: str,
    *,
    use: str = "train",
    label_field: str = "label",
    jobs: int = 1,
    quiet: bool = True,
) -> Dataset:
    """The data set that a spec names: shards, class names and index.

    Where a manifest stands next to the shards it is believed, and sizes are compared. Where no
    index is there that was made from these shards, one is made from their sidecars or by walking
    the tars, once: next to the manifest, or in a cache folder ($XDG_CACHE_HOME/wds_convnext)
    where there is none or its folder is read-only. Such an index has no checksums.

    Args:
        spec, use: see `expand.expand_spec`.
        label_field: where labels in .json members stand, where no manifest says so.
        jobs: processes that make an index.
        quiet: show no progress meanwhile.
    Raises:
        ShardError: if nothing matches, or the shards do not fit their manifest or each other.
        DataError: if there is no manifest, and a label is not a class number.
    """
    named = expand_shards(spec, use=use)
    paths = list(map(os.path.normpath, named))
    one_of_each = {re.sub(r"\d+\.tar$", "", path): path for path, by in named.items() if not by}
    stated = dict.fromkeys(
        os.path.normpath(path)
        for path in (*filter(None, named.values()), *map(manifest_path, one_of_each.values()))
    )
    if all(map(is_manifest, stated)):
        dataset, wholes = _from_manifests(paths, list(stated))
    else:
        for path in stated:
            if os.path.isdir(staging_path(path)) and not os.path.isfile(path):
                raise ShardError(
                    f"{staging_path(path)}: the conversion was interrupted, so shards may be "
                    "missing. Run the same conversion again: it goes on where it stopped."
                )
        dataset, wholes = _without_manifest(paths, label_field), {}
    dataset = _with_index(dataset, wholes, jobs=jobs, quiet=quiet)
    if len(dataset) == 0:
        raise ShardError(f"{spec}: the shards hold no samples.")
    return dataset


def _from_manifests(
    paths: list[str], manifest_paths: list[str]
) -> tuple[Dataset, dict[str, tuple[Shard, ...]]]:
    """The data set of these shards, and by manifest all shards that it lists."""
    manifests = {path: read_manifest(path) for path in manifest_paths}
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if difference := class_difference(first.class_names, manifest.class_names):
            raise ShardError(
                f"{first_path} and {path}: their class names differ: {difference}. "
                "Use one data set."
            )
    if len({manifest.label_field for manifest in manifests.values()}) > 1:
        raise ShardError(
            f"{' and '.join(manifests)}: their labels stand in different .json fields. "
            "Use one data set."
        )
    listed = {
        os.path.normpath(shard.path): shard
        for manifest in manifests.values()
        for shard in manifest.shards
    }
    for path in paths:
        if path not in listed:
            raise ShardError(
                f"{path}: not listed in {manifest_path(path)}. Leave it out, or index them again."
            )
        check_size(listed[path])
    for path, manifest in manifests.items():
        serve(path, manifest.shards)
    dataset = replace(first, shards=tuple(listed[path] for path in paths))
    return dataset, {path: manifest.shards for path, manifest in manifests.items()}


def _without_manifest(paths: list[str], label_field: str) -> Dataset:
    """A data set of which only the files are known; its index counts samples and classes."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(paths[0])))
    for path in paths:
        check_size(Shard(path, -1))
    shards = tuple(Shard(path, -1, os.path.getsize(path)) for path in paths)
    return Dataset(folder, split_of(paths[0]), shards, (), label_field)


def _with_index(
    dataset: Dataset, wholes: dict[str, tuple[Shard, ...]], *, jobs: int, quiet: bool
) -> Dataset:
    """A data set with the index of its samples.

    Args:
        wholes: by manifest path, all shards that the manifest lists; empty without manifests.
    """
    normal = lru_cache(maxsize=None)(os.path.normpath)
    named = {normal(shard.path) for shard in dataset.shards}
    parts = [(manifest_path(dataset.shards[0].path), dataset.shards, False)]
    if wholes:
        listed = {
            path: tuple(s for s in shards if normal(s.path) in named)
            for path, shards in wholes.items()
        }
        parts = [(path, some, len(some) == len(wholes[path])) for path, some in listed.items()]
    found: dict[str, tuple[IndexFile, int, int]] = {}
    for path, shards, is_whole in parts:
        file = find_index(
            shards,
            index_at=index_path(path),
            is_whole=is_whole,
            label_field=dataset.label_field,
            jobs=jobs,
            quiet=quiet,
        )
        for shard in shards:
            place = file.find(shard)
            assert place is not None  # `find_index` gives a file that has them all
            found[normal(shard.path)] = (file, *place)
    places = [found[normal(shard.path)] for shard in dataset.shards]
    shards = tuple(
        replace(shard, num_samples=num_samples)
        for shard, (_, num_samples, _) in zip(dataset.shards, places)
    )
    index = SampleIndex(shards, [(file, offset) for file, _, offset in places])
    dataset = replace(dataset, shards=shards, index=index)
    if not wholes:
        num_classes = int(dataset.labels.max(initial=-1)) + 1
        if num_classes > MAX_CLASSES:  # as only a damaged index can say
            path = index.places[0][0].path
            raise ShardError(
                f"{path}: a label of {num_classes - 1:,}. Delete it, it is made again."
            )
        names = tuple(map(str, range(num_classes)))
        dataset = replace(dataset, class_names=names, is_counted=True)
    return dataset


def open_splits(
    shards: str, val_shards: str | None, *, jobs: int, quiet: bool
) -> tuple[Dataset, Dataset | None, str | None]:
    """The training split, the validation split if there is one, and what names the latter.

    Both have the class names of the one whose manifest states them.

    Args:
        shards: a spec, see `expand.expand_spec`.
        val_shards: likewise; None for those next to the training shards.
        jobs, quiet: see `open_dataset`.
    Raises:
        ShardError: if the splits cannot be opened, or their classes differ or are fewer than two.
    """
    train_data = open_dataset(shards, jobs=jobs, quiet=quiet)
    spec = val_shards or find_counterpart(train_data.shards[0].path, use="validation")
    val_data = None
    if spec:
        val_data = open_dataset(spec, use="validation", jobs=jobs, quiet=quiet)
        classes = _shared_classes(train_data, val_data)
        train_data = with_classes(train_data, classes, of=spec)
        val_data = with_classes(val_data, classes, of=shards)
    if train_data.num_classes < 2:
        raise ShardError(
            f"{shards}: all {len(train_data):,} samples are of one class, so there is "
            "nothing to learn. Look at their labels: wds-convnext inspect."
        )
    return train_data, val_data, spec


def _shared_classes(train_data: Dataset, val_data: Dataset) -> tuple[str, ...]:
    """The class names of both splits: stated by a manifest, else as many as either has labels."""
    if not train_data.is_counted:
        return train_data.class_names
    if not val_data.is_counted:
        return val_data.class_names
    return max(train_data.class_names, val_data.class_names, key=len)
