"""The scatter shuffle: which shard each row goes to, and to which place in it.

Both are arithmetic. The rows of a class, in a keyed random order, and the classes one
after the other, are dealt out to the shards like cards: so every shard has as many samples of a
class as any other, plus or minus one, and as many samples. Then each shard is permuted.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wds_convnext.rng import derive_key, permute, subkeys


@dataclass(frozen=True)
class Scatter:
    """Where each row of a split goes, given how many rows each class has (int64, by class)."""

    class_counts: np.ndarray
    num_shards: int
    seed: int
    split: str

    @cached_property
    def _class_starts(self) -> np.ndarray:
        return np.cumsum(self.class_counts) - self.class_counts

    def shard_size(self, shard: int | np.ndarray) -> np.ndarray:
        """Samples in a shard; shards differ by at most one."""
        num_rows = int(self.class_counts.sum())
        return (num_rows - np.asarray(shard) + self.num_shards - 1) // self.num_shards

    def destination(self, labels: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and place of rows, from their class and their number within it."""
        class_keys = subkeys(derive_key("scatter class", self.split, self.seed), labels)
        dealt = self._class_starts[labels]
        dealt = dealt + permute(ranks, self.class_counts[labels], class_keys)
        shards = dealt % self.num_shards
        shard_keys = subkeys(derive_key("scatter place", self.split, self.seed), shards)
        places = permute(dealt // self.num_shards, self.shard_size(shards), shard_keys)
        return shards, places


def ranks_in_class(labels: np.ndarray, counts_before: np.ndarray) -> np.ndarray:
    """The number of each row within its class, counting on from `counts_before` (by class)."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - first + counts_before[ordered]
    return ranks
