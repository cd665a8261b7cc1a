"""Which rows go to which shard and which spill file, and which splits are shuffled."""

from pathlib import Path

import numpy as np

from wds_convnext.config import ShardsConfig
from wds_convnext.conversion.parquet import ParquetSplit
from wds_convnext.errors import UsageError

TAR_BYTES = 2048  # a sample's headers, label and padding
_MAX_SHARDS = 1_000_000
_UNIT_BYTES = 256 << 20  # images in a spill file
_MAX_UNITS = 512  # spill files are open together while a shard collects its samples


def dataset_name(split: ParquetSplit) -> str:
    """The name of the folder that holds the files, or its `data/`."""
    folder = Path(split.parts[0].path).absolute().parent
    return (folder.parent if folder.name == "data" else folder).name


def shard_edges(split: ParquetSplit, config: ShardsConfig) -> list[int]:
    """The rows at which shards begin, and the number of rows; at least one row in each.

    Without a size there is a shard for every file. Else sizes differ by at most one sample.

    Raises:
        UsageError: if there are more shards than rows.
    """
    num_rows, num_shards = split.num_rows, config.num_shards
    if config.samples_per_shard:
        num_shards = -(-num_rows // config.samples_per_shard)
    if config.shard_size:
        num_shards = -(-(split.num_bytes + TAR_BYTES * num_rows) // config.shard_size)
    if num_shards is None:
        return sorted(set(split.part_starts))
    if num_shards > _MAX_SHARDS:  # as only a forged footer or a mistyped size can ask for
        raise UsageError(
            f"{num_shards:,} shards of {split.name}: at most {_MAX_SHARDS:,}. Write larger shards."
        )
    if num_shards > num_rows:
        raise UsageError(
            f"{num_shards:,} shards for {num_rows:,} rows of {split.name}. Ask for fewer shards."
        )
    return [number * num_rows // num_shards for number in range(num_shards + 1)]


def unit_edges(split: ParquetSplit) -> list[int]:
    """The rows at which spill files begin: row groups that together have about 256 MB."""
    num_units = min(max(1, split.num_bytes // _UNIT_BYTES), _MAX_UNITS)
    starts = np.unique(split.group_starts)
    wanted = np.arange(num_units + 1) * split.num_rows // num_units
    return np.unique(starts[np.searchsorted(starts, wanted)]).tolist()
