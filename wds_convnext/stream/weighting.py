"""How often each sample comes in an epoch: exact shares for classes, or for the sets of a mixture.

An epoch's positions are divided among groups of samples. A group has exactly its share of them,
rounded to a whole number once. Each of its samples comes floor(share / size) times, and some once
more: the samples stand in a keyed cyclic order, of which each epoch takes the next ones. So no
sample of a group is ever ahead of another by more than one, in an epoch or in a run.

Peers draw with replacement (torch's WeightedRandomSampler), where a share of 1 means that 37 % of
the samples do not come in an epoch; none of them is exact, distributed and resumable at once
(pytorch issue 77154, open since 2022).

Memory: 8 bytes per sample, and 8 bytes per 64 samples and epoch. CPU: see `bench_order`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from wds_convnext.rng import derive_key, subkeys

_BLOCK = 64  # samples whose copies are counted together
_CHUNK = 1 << 20  # samples looked at at a time when an epoch begins


@dataclass(frozen=True, eq=False)
class Weighting:
    """The groups of a data set's samples, and the share that each has of an epoch.

    Args:
        group: of each sample; int32 (num_samples,), in [0, num_groups).
        shares: positions of an epoch that each group gets; int64 (num_groups,), 0 for a group
            without samples.
        seed: of the cyclic orders.
    """

    group: np.ndarray
    shares: np.ndarray
    seed: int

    def __post_init__(self) -> None:
        if np.any(self.shares[self.sizes == 0]):
            raise ValueError("a group without samples has a share")

    @cached_property
    def epoch_size(self) -> int:
        """Positions of an epoch."""
        return int(self.shares.sum())

    @cached_property
    def sizes(self) -> np.ndarray:
        """Samples of each group, int64 (num_groups,)."""
        return np.bincount(self.group, minlength=len(self.shares)).astype(np.int64)

    @cached_property
    def turn(self) -> np.ndarray:
        """Each sample's place in the cyclic order of its group, int32 (num_samples,)."""
        keys = subkeys(derive_key(self.seed, "turn"), np.arange(len(self.group)))
        by_group = np.lexsort((keys, self.group))  # no two keys are equal
        starts = np.cumsum(self.sizes) - self.sizes
        turn = np.empty(len(self.group), dtype=np.int32)
        turn[by_group] = np.arange(len(self.group)) - np.repeat(starts, self.sizes)
        return turn

    @cached_property
    def digest(self) -> str:
        """Identifies who comes how often: groups and shares."""
        facts = self.shares.astype("<i8").tobytes() + self.group.astype("<i4").tobytes()
        return hashlib.sha256(facts).hexdigest()[:16]

    def epoch(self, epoch: int) -> "EpochCopies":
        """The samples of an epoch, each as often as it comes."""
        return _cached_epoch(self, epoch)


class EpochCopies:
    """An epoch's samples laid end to end in stored order, each as often as it comes."""

    def __init__(self, weighting: Weighting, epoch: int):
        self._weighting = weighting
        sizes = np.maximum(weighting.sizes, 1)
        self._sizes = sizes
        self._all, self._more = np.divmod(weighting.shares, sizes)
        # Epoch e takes the e-th run of `more` turns: those before it have been taken.
        self._first_turn = epoch * self._more % sizes
        self._starts = self._block_starts()

    def copies(self, numbers: np.ndarray) -> np.ndarray:
        """How often samples come in this epoch; int64, same shape. 0 beyond the last sample."""
        is_sample = numbers < len(self._weighting.group)
        numbers = np.where(is_sample, numbers, 0)
        group, turn = self._weighting.group[numbers], self._weighting.turn[numbers]
        waits = (turn - self._first_turn[group]) % self._sizes[group]
        return (self._all[group] + (waits < self._more[group])) * is_sample

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at places in [0, epoch_size), and which of its copies each is, from 0."""
        block = np.searchsorted(self._starts, places, side="right") - 1
        copies = self.copies(block[:, None] * _BLOCK + np.arange(_BLOCK))
        ends = self._starts[block][:, None] + np.cumsum(copies, axis=1)
        index = np.sum(ends <= places[:, None], axis=1)
        row = np.arange(len(places))
        return block * _BLOCK + index, places - (ends[row, index] - copies[row, index])

    def starts_of(self, numbers: np.ndarray) -> np.ndarray:
        """The place of each sample's first copy, or where it would be; the inverse of `locate`."""
        block, index = np.divmod(numbers, _BLOCK)
        copies = self.copies(block[:, None] * _BLOCK + np.arange(_BLOCK))
        before = np.sum(copies * (np.arange(_BLOCK) < index[:, None]), axis=1)
        return self._starts[block] + before

    def _block_starts(self) -> np.ndarray:
        end = -(-len(self._weighting.group) // _BLOCK) * _BLOCK
        chunks = (np.arange(i, min(i + _CHUNK, end)) for i in range(0, end, _CHUNK))
        sums = [self.copies(chunk.reshape(-1, _BLOCK)).sum(axis=1) for chunk in chunks]
        return np.concatenate([[0], np.cumsum(np.concatenate(sums))])


@lru_cache(maxsize=4)
def _cached_epoch(weighting: Weighting, epoch: int) -> EpochCopies:
    return EpochCopies(weighting, epoch)


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Divide `total` positions in the ratio of weights, as exactly as whole numbers can.

    By largest remainders (Hamilton's method): each share is its quota rounded down or up.

    Args:
        weights: finite, at least 0, not all 0.
    Returns:
        int64 (len(weights),), sums to `total`.
    """
    quotas = total * np.asarray(weights, dtype=np.float64) / math.fsum(weights)
    shares = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(shares - quotas, kind="stable")  # of equal ones the first
    shares[by_remainder[: total - shares.sum()]] += 1
    return shares
