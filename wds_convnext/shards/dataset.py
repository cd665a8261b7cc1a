"""A split of shards as one value: `Dataset`, and its manifest.

A manifest `train.json` stands next to `train-000.tar`, `train-001.tar`, … in the shape that the
wids package reads, plus sizes, checksums and class names. It is written last, so its presence
means that every shard it lists is complete. The index `train.index` says where each sample stands.
"""

import hashlib
import json
import os
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wds_convnext.files import write_atomically
from wds_convnext.shards.index import SampleIndex
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.spec import (
    MANIFEST_FORMAT,
    Shard,
    load_manifest,
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

    def is_meant_by(self, digest: str) -> bool:
        """Whether a digest is of these files, which may have got a manifest's checksums since."""
        without_sums = replace(self, shards=tuple(replace(s, sha256=None) for s in self.shards))
        return digest in (self.digest, without_sums.digest)

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
        """Write the manifest, next to its shards or with their URLs, atomically."""
        shardlist = [
            {
                "url": shard.where if shard.is_remote else shard.name,
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
