"""The order of one epoch: offsets within it to samples, and back."""

from typing import NamedTuple

import numpy as np

from wds_convnext.rng import derive_key, permute, subkeys


class Pieces(NamedTuple):
    """Parts of shards, each within one lane, and between which positions their samples stand.

    int64 arrays of one length; `last` is inclusive, and a bound: of shards and windows.
    """

    shard: np.ndarray
    lane: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Uniform:
    """One permutation of all samples; a single lane."""

    def __init__(self, sizes: np.ndarray, key: int):
        self.num_samples, self.key = int(np.sum(sizes)), key
        self.shards = np.flatnonzero(sizes)  # those that hold samples

    def __call__(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return permute(offsets, self.num_samples, self.key), np.zeros_like(offsets)

    def offsets_of(self, numbers: np.ndarray) -> np.ndarray:
        """The offsets at which samples stand."""
        return permute(numbers, self.num_samples, self.key, inverse=True)

    def pieces(self) -> Pieces:
        """Offsets of shards: all of the epoch."""
        none = np.zeros_like(self.shards)
        return Pieces(self.shards, none, none, none + self.num_samples - 1)


class Windowed:
    """Permuted shards end to end, cut into lanes; each lane shuffled in overlapping windows."""

    def __init__(self, sizes: np.ndarray, shuffle_buffer: int, num_lanes: int, key: int):
        self.num_samples = int(np.sum(sizes))
        self.num_lanes = min(num_lanes, self.num_samples)
        self.window = max(1, shuffle_buffer // self.num_lanes)
        self.shifts = self.window // 2, 0
        self.key = key
        self.shards_key = derive_key(key, "shards")
        self.shard_order = permute(np.arange(len(sizes)), len(sizes), self.shards_key)
        self.laid_starts = shard_starts(np.asarray(sizes)[self.shard_order])
        self.starts = shard_starts(sizes)

    def __call__(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and lanes at offsets within the epoch."""
        length, longer = divmod(self.num_samples, self.num_lanes)
        index, lane = np.divmod(offsets, self.num_lanes)
        for shift in self.shifts:
            index = self._shuffle(index, lane, shift=shift)
        laid_at = lane * length + np.minimum(lane, longer) + index
        # side="right" passes over empty shards
        shard = np.searchsorted(self.laid_starts, laid_at, side="right") - 1
        sample = laid_at - self.laid_starts[shard]
        return self.starts[self.shard_order[shard]] + sample, lane

    def offsets_of(self, numbers: np.ndarray) -> np.ndarray:
        """The offsets within the epoch at which samples stand: each step of a call, undone."""
        shard = np.searchsorted(self.starts, numbers, side="right") - 1
        num_shards = len(self.shard_order)
        place = permute(shard, num_shards, self.shards_key, inverse=True)
        laid_at = self.laid_starts[place] + numbers - self.starts[shard]
        length, longer = divmod(self.num_samples, self.num_lanes)
        lane = np.maximum(laid_at // (length + 1), (laid_at - longer) // length)
        index = laid_at - lane * length - np.minimum(lane, longer)
        for shift in reversed(self.shifts):
            index = self._shuffle(index, lane, shift=shift, inverse=True)
        return index * self.num_lanes + lane

    def pieces(self) -> Pieces:
        """Between which offsets the samples of each shard stand: by lane, as wide as windows."""
        length, longer = divmod(self.num_samples, self.num_lanes)
        lanes = np.arange(self.num_lanes + 1)
        lane_starts = lanes * length + np.minimum(lanes, longer)
        cuts = np.unique(np.concatenate([self.laid_starts, lane_starts]))
        laid_at, ends = cuts[:-1], cuts[1:]
        shard = np.searchsorted(self.laid_starts, laid_at, side="right") - 1
        lane = np.searchsorted(lane_starts, laid_at, side="right") - 1
        first, last = laid_at - lane_starts[lane], ends - 1 - lane_starts[lane]
        lane_length = length + (lane < longer)
        for shift in reversed(self.shifts):  # as in `offsets_of`: a sample stays in its window
            first = np.maximum((first + shift) // self.window * self.window - shift, 0)
            last = ((last + shift) // self.window + 1) * self.window - shift - 1
            last = np.minimum(last, lane_length - 1)
        offsets = (index * self.num_lanes + lane for index in (first, last))
        return Pieces(self.shard_order[shard], lane, *offsets)

    def _shuffle(
        self, index: np.ndarray, lane: np.ndarray, *, shift: int, inverse: bool = False
    ) -> np.ndarray:
        """Permute within windows of a lane; the first window is shortened by `shift`."""
        length, longer = divmod(self.num_samples, self.num_lanes)
        lane_length = length + (lane < longer)
        window = (index + shift) // self.window
        first = np.maximum(window * self.window - shift, 0)
        last = np.minimum((window + 1) * self.window - shift, lane_length)
        key = derive_key(self.key, "windows", shift)
        keys = subkeys(key, subkeys(key, lane) + window.astype(np.uint64))
        return first + permute(index - first, last - first, keys, inverse=inverse)


def shard_starts(sizes: np.ndarray) -> np.ndarray:
    """Where each shard begins when shards of these sizes are laid end to end, and their end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
