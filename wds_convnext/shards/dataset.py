"""A split of shards as one value: `Dataset`, its manifest, and opening both.

A manifest `train.json` stands next to `train-000.tar`, `train-001.tar`, … in the shape that the
wids package reads, plus sizes, checksums and class names. It is written last, so its presence
means that every shard it lists is complete. The index `train.index` says where each sample stands.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wds_convnext.errors import ShardError
from wds_convnext.files import write_atomically
from wds_convnext.shards.classes import class_difference
from wds_convnext.shards.expand import expand_shards
from wds_convnext.shards.index import IndexFile, SampleIndex
from wds_convnext.shards.indexing import find_index
from wds_convnext.shards.naming import split_of
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.scan import MAX_CLASSES
from wds_convnext.shards.spec import (
    MANIFEST_FORMAT,
    Shard,
    check_size,
    index_path,
    is_manifest,
    load_manifest,
    manifest_path,
    staging_path,
)


class Sample(NamedTuple):
    """One sample: its key, its encoded image, its class number."""

    key: str
    image: bytes
    label: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """The shards of one split, in order; a sequence of samples, numbered over all shards.

    Also a map-style data set for torch's DataLoader and a random-access source for Grain. Reading
    compares each sample with its checksum, see `reader`. May be pickled, and used after a fork.

    Args:
        name: of the data set.
        shards: in the order of the sample numbers.
        class_names: by class number.
        is_counted: no manifest names the classes; they are numbers up to the highest label.
        label_field: where labels in .json members stand.
        source, options: what the shards were made from and how, as the manifest notes it.
        index: where each sample stands; None for a manifest that was only read.
    """

    name: str
    split: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    label_field: str = "label"
    source: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    index: SampleIndex | None = field(default=None, repr=False)
    is_counted: bool = False

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, number: int) -> Sample:
        """A sample, checked.

        Raises:
            IndexError: if there is no sample of this number.
            ShardError, DataError: as `SampleReader.read`.
        """
        size = len(self)
        if not -size <= number < size:
            raise IndexError(f"sample {number} of a data set of {size:,}")
        number = int(number) % size
        image, label = self._reader.read(number)
        return Sample(self._reader.key(number), image, label)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Samples per shard, int64 (num_shards,)."""
        return np.array([shard.num_samples for shard in self.shards], dtype=np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """The class number of every sample, int32 (num_samples,); no image is touched."""
        assert self.index is not None  # that of a manifest that was only read has no samples
        labels = self.index.labels()
        labels.flags.writeable = False
        return labels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """Identifies the samples and their order: shard names, sizes and checksums."""
        facts = [(s.name, s.num_samples, s.num_bytes, s.sha256) for s in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @cached_property
    def digest_without_sums(self) -> str:
        """The digest that the same files have without a manifest's checksums."""
        return replace(self, shards=tuple(replace(s, sha256=None) for s in self.shards)).digest

    def locate(self, number: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's number in it."""
        shard = bisect_right(self._starts, number) - 1  # right: passes over empty shards
        return shard, number - self._starts[shard]

    def numbers_of(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        return range(self._starts[shard], self._starts[shard + 1])

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum(self.sizes).tolist()]

    @cached_property
    def _reader(self) -> SampleReader:
        return SampleReader(self)

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "_reader"}

    def write_manifest(self, path: str | os.PathLike) -> None:
        """Write the manifest next to its shards, atomically."""
        shardlist = [
            {
                "url": shard.name,
                "nsamples": shard.num_samples,
                "filesize": shard.num_bytes,
                "sha256": shard.sha256,
            }
            for shard in self.shards
        ]
        content = {
            "wids_version": 1,
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "split": self.split,
            "class_names": list(self.class_names),
            "source": list(self.source),
            "options": self.options,
            "shardlist": shardlist,
        }
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def read_manifest(path: str | os.PathLike) -> Dataset:
    """The data set that a manifest describes, without an index.

    Raises:
        ShardError: if it is missing, not a manifest, or written by a newer version.
    """
    content, shards = load_manifest(path)
    options = content.get("options") or {}
    split = content.get("split")
    return Dataset(
        name=content.get("name") or "",
        split=Path(path).stem if split is None else split,
        shards=shards,
        class_names=tuple(content["class_names"]),
        label_field=options.get("label_field") or "label",
        source=tuple(content.get("source") or ()),
        options=options,
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
    beside = dict.fromkeys(
        os.path.normpath(path)
        for path in (*filter(None, named.values()), *map(manifest_path, one_of_each.values()))
    )
    if all(map(is_manifest, beside)):
        dataset, wholes = _from_manifests(paths, list(beside))
    else:
        for path in beside:
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
                f"{path}: not listed in {manifest_path(path)}. Leave it out, or index them anew."
            )
        check_size(listed[path])
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
            beside=index_path(path),
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
