"""Which rows go to which shard and which spill file, and which splits are shuffled."""

import numpy as np

from wds_convnext.config import ShardsConfig
from wds_convnext.conversion.source import SourceSplit
from wds_convnext.errors import UsageError

TAR_BYTES = 2048  # a sample's headers, label and padding
_MAX_SHARDS = 1_000_000
_SHARD_BYTES = 256 << 20  # where the source suggests no number of shards
UNIT_BYTES = 256 << 20  # images in a spill file
_MAX_UNITS = 512  # spill files are open together while a shard collects its samples


def shard_edges(split: SourceSplit, config: ShardsConfig) -> list[int]:
    """The rows at which shards begin, and the number of rows; at least one row in each.

    Without a size there is a shard for every file, or where files are no such unit about 256 MB in
    each. Else sizes differ by at most one sample.

    Raises:
        UsageError: if there are more shards than rows.
    """
    num_rows, num_shards = split.num_rows, config.num_shards
    if config.samples_per_shard:
        num_shards = -(-num_rows // config.samples_per_shard)
    if config.shard_size:
        num_shards = -(-(split.num_bytes + TAR_BYTES * num_rows) // config.shard_size)
    if num_shards is None and split.file_starts:
        return sorted(set(split.file_starts))
    if num_shards is None:
        num_shards = min(num_rows, -(-(split.num_bytes + TAR_BYTES * num_rows) // _SHARD_BYTES))
    if num_shards > _MAX_SHARDS:  # as only a forged footer or a mistyped size can ask for
        raise UsageError(
            f"{num_shards:,} shards of {split.name}: at most {_MAX_SHARDS:,}. Write larger shards."
        )
    if num_shards > num_rows:
        raise UsageError(
            f"{num_shards:,} shards for {num_rows:,} rows of {split.name}. Ask for fewer shards."
        )
    return [number * num_rows // num_shards for number in range(num_shards + 1)]


def unit_edges(split: SourceSplit) -> list[int]:
    """The rows at which spill files begin: about 256 MB apart, where reading can begin."""
    num_units = min(max(1, split.num_bytes // UNIT_BYTES), _MAX_UNITS)
    wanted = np.arange(num_units + 1) * split.num_rows // num_units
    if not split.read_starts:
        return np.unique(wanted).tolist()
    starts = np.unique(split.read_starts)
    return np.unique(starts[np.searchsorted(starts, wanted)]).tolist()
