"""Shards that exist already, to shuffle them, to change their size or to leave out bad samples.

They are opened as training opens them: a manifest is believed, else the tars are walked. Labels
are class numbers, in `.cls` or in a field of `.json`. Of a sample, image and label are taken.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from wds_convnext.conversion.source import (
    BATCH_BYTES,
    MAX_BATCH,
    Count,
    Opener,
    RowBatch,
    SourceSplit,
    refuse_columns,
)
from wds_convnext.errors import DataError
from wds_convnext.files import read_at
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.expand import expand_shards
from wds_convnext.shards.headers import walk_headers
from wds_convnext.shards.naming import split_of
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.spec import is_manifest, manifests_in, total_bytes

_IMAGE_COLUMN = "samples"
_LOOKED_AT = 64  # members of a tar


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardsSplit(SourceSplit):
    """The samples of a data set of shards, numbered as there."""

    data: Dataset

    def labels(self, start: int, stop: int) -> Iterator[np.ndarray]:
        assert self.data.index is not None  # it was opened with one
        for shard in range(len(self.data.shards)):
            numbers = self.data.numbers_of(shard)
            first, last = max(start, numbers.start), min(stop, numbers.stop)
            if first < last:
                labels = self.data.index.records(shard)["label"]
                yield labels[first - numbers.start : last - numbers.start]

    def rows(self, start: int, stop: int) -> Iterator[RowBatch]:
        images: list[bytes | DataError] = []
        labels: list[int] = []
        num_bytes = 0
        for row in range(start, stop):
            try:
                sample = self.data[row]
                images.append(sample.image)
                labels.append(sample.label)
                num_bytes += len(sample.image)
            except DataError as error:
                images.append(error)
                labels.append(-1)
            if num_bytes >= BATCH_BYTES or len(images) == MAX_BATCH or row == stop - 1:
                yield RowBatch(row + 1 - len(images), images, labels)
                images, labels, num_bytes = [], [], 0

    def locate(self, row: int) -> tuple[str, int]:
        shard, sample = self.data.locate(row)
        return self.data.shards[shard].name, sample


def find(source: str, count: Count) -> dict[str, Opener] | None:
    """The splits of shards: a folder, a manifest, a range or glob of tars, or one tar of samples.

    Raises:
        ShardError: if a range or a manifest lacks files.
    """
    if os.path.isdir(source):
        specs = {
            split_of(os.path.basename(path.removesuffix(".json") + ".tar")): (
                path if is_manifest(path, in_place=False) else ",".join(paths)
            )
            for path, paths in manifests_in(source).items()
        }
    elif source.endswith(".json") and is_manifest(source, in_place=False):
        specs = {os.path.basename(source).removesuffix(".json"): source}
    elif source.endswith(".tar") and (not os.path.isfile(source) or _holds_samples(source)):
        specs = {}
        for path in expand_shards(source):
            name = split_of(os.path.basename(path))
            specs[name] = f"{specs[name]},{path}" if name in specs else path
    else:
        return None
    for _ in specs:
        count(1, 0)
    return {name: partial(_open, name, spec) for name, spec in specs.items()} or None


def _holds_samples(path: str) -> bool:
    """Whether a tar has labels next to its images, not class folders."""
    with open(path, "rb") as file:
        try:
            headers = [*islice(walk_headers(partial(read_at, file.fileno())), _LOOKED_AT)]
        except ValueError:
            return False
    names = [header.name for header in headers if header.is_file]
    return any(
        name.endswith(".cls") or (name.endswith(".json") and "/" not in name.removeprefix("./"))
        for name in names
    )


def _open(
    name: str, spec: str, *, image: str | None = None, label: str | None = None
) -> SourceSplit:
    refuse_columns(spec, (_IMAGE_COLUMN, label or ""), image, None)
    data = open_dataset(spec, label_field=label or "label", quiet=False)
    return ShardsSplit(
        name=name,
        num_rows=len(data),
        num_bytes=total_bytes(data.shards),
        digest=data.digest,
        dataset=data.name,
        files=tuple(shard.path for shard in data.shards),
        columns=(_IMAGE_COLUMN, data.label_field),
        class_names=None if data.is_counted else data.class_names,
        file_starts=(*(data.numbers_of(i).start for i in range(len(data.shards))), len(data)),
        data=data,
    )
