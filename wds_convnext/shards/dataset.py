"""A split of shards as one value: `Dataset`, its manifest, and opening both.

A manifest `train.json` stands beside `train-000.tar`, `train-001.tar`, … in the shape that the
wids package reads, plus sizes, checksums and class names. It is written last, so its presence
means that every shard it lists is complete.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wds_convnext.errors import ShardError
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.spec import (
    Shard,
    check_size,
    expand_spec,
    manifest_path,
    read_manifest,
    split_of,
    staging_path,
)
from wds_convnext.shards.tar import index_samples, read_samples


@dataclass(frozen=True)
class Dataset:
    """The shards of one split, in order, and the names of the classes their labels count."""

    name: str
    split: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    label_field: str = "label"  # of .json labels

    @cached_property
    def sizes(self) -> np.ndarray:
        """Samples per shard, int64 (num_shards,)."""
        return np.array([shard.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """Identifies the samples and their order: shard names, sizes and checksums."""
        facts = [(s.name, s.num_samples, s.num_bytes, s.sha256) for s in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def open_dataset(spec: str, *, progress: Callable = iter) -> Dataset:
    """The shards that a spec names, with their sizes and class names.

    Where a manifest stands beside them it is believed, and sizes are compared. Without one every
    shard is indexed and every label read once; `progress` wraps the list of shards meanwhile.

    Raises:
        ShardError: if nothing matches, or the shards do not fit their manifest or each other.
    """
    paths = expand_spec(spec)
    beside = dict.fromkeys(manifest_path(path) for path in paths)
    if all(os.path.isfile(path) for path in beside):
        dataset = _from_manifests(paths, list(beside))
    else:
        for path in beside:
            if os.path.isdir(staging_path(path)) and not os.path.isfile(path):
                raise ShardError(
                    f"{staging_path(path)}: the conversion was interrupted, so shards may be "
                    "missing. Run the same make shards again: it goes on where it stopped."
                )
        dataset = _survey(paths, progress)
    if dataset.num_samples == 0:
        raise ShardError(f"{spec}: the shards hold no samples.")
    return dataset


def find_validation(train_data: Dataset) -> str | None:
    """A spec of the validation shards beside training shards, by name; None if there are none."""
    folder = os.path.dirname(train_data.shards[0].path)
    for split in ("validation", "val"):
        for pattern in (f"{split}.json", f"{split}-*.tar"):
            if glob.glob(os.path.join(glob.escape(folder), pattern)):
                return os.path.join(folder, pattern)
    return None


def _from_manifests(paths: list[str], manifest_paths: list[str]) -> Dataset:
    manifests = [read_manifest(path) for path in manifest_paths]
    if len({manifest.class_names for manifest in manifests}) > 1:
        raise ShardError(
            f"{' and '.join(manifest_paths)}: their class names differ. Use one data set."
        )
    if len({manifest.label_field for manifest in manifests}) > 1:
        raise ShardError(
            f"{' and '.join(manifest_paths)}: their labels stand in different .json fields. "
            "Use one data set."
        )
    listed = {
        os.path.normpath(shard.path): shard for manifest in manifests for shard in manifest.shards
    }
    paths = list(map(os.path.normpath, paths))
    for path in paths:
        if path not in listed:
            raise ShardError(
                f"{path}: not listed in {manifest_path(path)}. Leave it out, or run make shards."
            )
        check_size(listed[path])
    first = manifests[0]
    shards = tuple(listed[path] for path in paths)
    return Dataset(first.dataset, first.split, shards, first.class_names, first.label_field)


def _survey(paths: list[str], progress: Callable) -> Dataset:
    shards, highest = [], -1
    for path in progress(paths):
        num_samples = len(index_samples(path, read_samples(path)))
        shard = Shard(path, num_samples, os.path.getsize(path))
        reader = SampleReader((shard,))
        labels = [reader.read_label(0, sample) for sample in range(num_samples)]
        reader.close()
        if labels and min(labels) < 0:
            raise ShardError(f"{path}: a label of {min(labels)}. Labels count from 0.")
        highest = max([highest, *labels])
        shards.append(shard)
    folder = os.path.basename(os.path.dirname(os.path.abspath(paths[0])))
    class_names = tuple(str(label) for label in range(highest + 1))
    return Dataset(folder, split_of(paths[0]), tuple(shards), class_names)
