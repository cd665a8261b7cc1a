"""Which sample stands at which position of the stream. Pure arithmetic: opens no file.

N is the number of samples, G the global batch size. The training stream is endless: epoch 0's
permutation, then epoch 1's, and so on. Step k takes the positions k*G ... (k+1)*G - 1, so each
sample comes exactly once per epoch, no batch is short, and a batch may straddle two epochs.

A shuffle buffer of at least N gives one uniform permutation of all samples. A smaller one keeps
reads local: the shards, permuted, are laid end to end and cut into lanes, interleaved round-robin;
within a lane each output position depends on two overlapping windows of buffer / lanes samples
(the second half a window further on, so that samples cross the borders of the first). It is the
shuffle buffer made seekable: any position is reached without visiting those before it.

State: 16 bytes per shard and epoch. A billion samples in 100,000 shards are 1.6 MB.

A `Weighting` repeats samples, or leaves them out, before any of this: an epoch is then a
permutation of copies, and a shard is as long as its samples' copies.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from wds_convnext.errors import UsageError
from wds_convnext.rng import derive_key, mix64, permute, subkeys
from wds_convnext.stream.weighting import Weighting

NUM_LANES = 32  # divides the usual batch sizes and numbers of ranks; files open at a time


class SampleRefs(NamedTuple):
    """References to the samples of a batch; int64 arrays of one length."""

    number: np.ndarray  # number of the sample in its data set
    epoch: np.ndarray
    copy: np.ndarray  # which of its copies in the epoch, from 0; always 0 without a weighting
    is_real: np.ndarray  # bool; False for the padding of a last evaluation batch

    def __len__(self) -> int:
        return len(self.number)

    def take(self, index: np.ndarray | slice) -> "SampleRefs":
        return SampleRefs(*(column[index] for column in self))


class Pieces(NamedTuple):
    """Parts of shards, each within one lane, and between which positions their samples stand.

    int64 arrays of one length; `last` is inclusive, and a bound: of shards and windows.
    """

    shard: np.ndarray
    lane: np.ndarray
    first: np.ndarray
    last: np.ndarray


@dataclass(frozen=True, eq=False)
class TrainOrder:
    """The endless order of a training run.

    Args:
        sizes: samples per shard, int64 (num_shards,).
        seed: of the order.
        global_batch_size: samples per optimizer step over all ranks and accumulated batches.
        shuffle_buffer: references shuffled together; at least the number of samples for a
            uniform permutation, 1 for shards in a random order, each read in its stored order.
        num_lanes: shards read side by side when the buffer is smaller than the data set.
        weighting: how often each sample comes in an epoch; None for once.
    """

    sizes: np.ndarray
    seed: int
    global_batch_size: int
    shuffle_buffer: int
    num_lanes: int = NUM_LANES
    weighting: Weighting | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UsageError("The shards hold no samples, so there is no order to make.")
        if self.global_batch_size < 1 or self.shuffle_buffer < 1 or self.num_lanes < 1:
            raise UsageError("Batch size, shuffle buffer and lanes must be at least 1.")

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch, copies counted."""
        return self.weighting.epoch_size if self.weighting else int(np.sum(self.sizes))

    def num_steps(self, num_epochs: int) -> int:
        """Steps of a run of so many epochs; the last batch takes from the epoch after."""
        return -(-num_epochs * self.num_samples // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch in which a step begins. Step k ends its epoch if step k+1 begins another."""
        return step * self.global_batch_size // self.num_samples

    def steps_of(self, epoch: int) -> range:
        """The steps that begin in an epoch; none if a batch spans several epochs."""
        first = self.num_steps(epoch)
        return range(first, self.num_steps(epoch + 1))

    def at(self, positions: np.ndarray) -> tuple[SampleRefs, np.ndarray]:
        """The samples at positions of the stream (int64, any order), and their lanes."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        number, copy, lane = (np.zeros_like(offsets) for _ in range(3))
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            place, lane[here] = _cached_epoch(self, epoch)(offsets[here])
            if self.weighting:
                number[here], copy[here] = self.weighting.epoch(epoch).locate(place)
            else:
                number[here] = place
        return SampleRefs(number, epochs, copy, np.ones(len(number), bool)), lane

    def positions_of(self, number: int, epochs: range) -> np.ndarray:
        """Where a sample stands in the stream in these epochs; int64, ascending.

        Once per epoch, or as often as the weighting has it. The inverse of `at`, by arithmetic:
        some ms per epoch and million shards.
        """
        positions = []
        for epoch in epochs:
            places = np.array([number])
            if self.weighting:
                copies = self.weighting.epoch(epoch)
                places = copies.starts_of(places) + np.arange(copies.copies(places)[0])
            offsets = _cached_epoch(self, epoch).offsets_of(places)
            positions.append(epoch * self.num_samples + np.sort(offsets))
        return np.concatenate(positions).astype(np.int64) if positions else np.zeros(0, np.int64)

    def pieces_of(self, epoch: int) -> "Pieces":
        """Where in the stream the samples of each shard may stand, in O(shards and lanes)."""
        shard, lane, first, last = _cached_epoch(self, epoch).pieces()
        start = epoch * self.num_samples
        return Pieces(shard, lane, start + first, start + last)

    def place_in_batch(self, position: int) -> int:
        """At which place of its step's global batch a position of the stream comes."""
        step, own = divmod(position, self.global_batch_size)
        num_lanes = min(self.num_lanes, self.num_samples)
        if self.shuffle_buffer >= self.num_samples:
            num_lanes = 1
        positions = step * self.global_batch_size + np.arange(self.global_batch_size)
        lane = positions % self.num_samples % num_lanes
        return int(np.sum(lane < lane[own]) + np.sum(lane[:own] == lane[own]))

    def global_batch(self, step: int) -> SampleRefs:
        """The samples of one step for all ranks together, sorted by lane (stable)."""
        first = step * self.global_batch_size
        refs, lane = self.at(np.arange(first, first + self.global_batch_size))
        return refs.take(np.argsort(lane, kind="stable"))

    def micro_batch(self, index: int, *, batch_size: int, rank: int, world_size: int) -> SampleRefs:
        """The index-th batch that one rank loads: each step is G / (batch x ranks) of them.

        Raises:
            UsageError: if batch size times ranks does not divide the global batch size.
        """
        accumulate, rest = divmod(self.global_batch_size, batch_size * world_size)
        if rest:
            raise UsageError(
                f"A global batch of {self.global_batch_size} cannot be made of batches of "
                f"{batch_size} on {world_size} ranks. Their product must divide it."
            )
        step, micro = divmod(index, accumulate)
        first = (rank * accumulate + micro) * batch_size
        return _cached_global_batch(self, step).take(slice(first, first + batch_size))

    def sample_keys(self, refs: SampleRefs) -> np.ndarray:
        """A uint64 key per reference, for the draws of its augmentation.

        It depends on seed, epoch, sample and copy.
        """
        key = derive_key(self.seed, "augment")
        turn = refs.epoch.astype(np.uint64) + mix64(refs.copy.astype(np.uint64))  # copy 0 adds 0
        return subkeys(key, subkeys(key, refs.number) + turn)


@dataclass(frozen=True)
class ValidationSchedule:
    """After which steps a run validates: those that end epoch 0, every, 2 * every …, and its last.

    Args:
        last_step: the number of steps after which the run ends.
    """

    order: TrainOrder
    every: int
    last_step: int

    def is_due(self, step: int) -> bool:
        """Whether the model is validated when `step` steps are done."""
        epoch = self.order.epoch_of(step - 1)
        ends_epoch = self.order.epoch_of(step) > epoch
        return step == self.last_step or (ends_epoch and epoch % self.every == 0)


@dataclass(frozen=True, eq=False)
class EvalOrder:
    """Every sample once, in stored order; ranks take the same number of batches."""

    sizes: np.ndarray

    def num_micro_batches(self, *, batch_size: int, world_size: int) -> int:
        return -(-int(np.sum(self.sizes)) // (batch_size * world_size))

    def micro_batch(self, index: int, *, batch_size: int, rank: int, world_size: int) -> SampleRefs:
        """As in training, but the last batches are filled with references that are not real."""
        num_samples = int(np.sum(self.sizes))
        first = (index * world_size + rank) * batch_size
        position = np.arange(first, first + batch_size)
        number = np.minimum(position, num_samples - 1)
        nothing = np.zeros_like(number)
        return SampleRefs(number, nothing, nothing, position < num_samples)

    def sample_keys(self, refs: SampleRefs) -> np.ndarray:
        """A uint64 key per reference, for what a transform draws: the same in each evaluation."""
        return subkeys(derive_key("evaluate"), refs.number)


@lru_cache(maxsize=4)
def _cached_global_batch(order: TrainOrder, step: int) -> SampleRefs:
    return order.global_batch(step)


@lru_cache(maxsize=4)
def _cached_epoch(order: TrainOrder, epoch: int) -> "_Uniform | _Windowed":
    key = derive_key(order.seed, "epoch", epoch)
    sizes = np.asarray(order.sizes)
    if order.weighting:  # shards are as long as their samples' copies, so that locality holds
        sizes = np.diff(order.weighting.epoch(epoch).starts_of(_starts(sizes)))
    if order.shuffle_buffer >= order.num_samples:
        return _Uniform(sizes, key)
    return _Windowed(sizes, order.shuffle_buffer, order.num_lanes, key)


class _Uniform:
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


class _Windowed:
    """Permuted shards end to end, cut into lanes; each lane shuffled in overlapping windows."""

    def __init__(self, sizes: np.ndarray, shuffle_buffer: int, num_lanes: int, key: int):
        self.num_samples = int(np.sum(sizes))
        self.num_lanes = min(num_lanes, self.num_samples)
        self.window = max(1, shuffle_buffer // self.num_lanes)
        self.shifts = self.window // 2, 0
        self.key = key
        self.shards_key = derive_key(key, "shards")
        self.shard_order = permute(np.arange(len(sizes)), len(sizes), self.shards_key)
        self.laid_starts = _starts(np.asarray(sizes)[self.shard_order])
        self.starts = _starts(sizes)

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


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each shard begins when shards of these sizes are laid end to end, and their end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
