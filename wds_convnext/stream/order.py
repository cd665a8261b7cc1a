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

With `repeats` each position of all this stands for so many of the stream, in a row: copies of one
sample, which come to the same step as a rule. An epoch stays N positions long.

A `Weighting` repeats samples, or leaves them out, before any of this: an epoch is then a
permutation of copies, and a shard is as long as its samples' copies.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from wds_convnext.errors import UsageError
from wds_convnext.rng import derive_key, mix64, subkeys
from wds_convnext.stream.epoch import Pieces, Uniform, Windowed, shard_starts
from wds_convnext.stream.weighting import Weighting

NUM_LANES = 32  # divides the usual batch sizes and numbers of ranks; files open at a time


class SampleRefs(NamedTuple):
    """References to the samples of a batch; int64 arrays of one length."""

    number: np.ndarray  # number of the sample in its data set
    epoch: np.ndarray  # with `repeats` the pass over the data set, which takes so many epochs
    copy: np.ndarray  # which of its copies in it, from 0; always 0 without weighting and repeats
    is_real: np.ndarray  # bool; False for the padding of a last evaluation batch

    def __len__(self) -> int:
        return len(self.number)

    def take(self, index: np.ndarray | slice) -> "SampleRefs":
        return SampleRefs(*(column[index] for column in self))


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
        repeats: how often each sample comes in a row (repeated augmentation, arXiv:1901.09335).
    """

    sizes: np.ndarray
    seed: int
    global_batch_size: int
    shuffle_buffer: int
    num_lanes: int = NUM_LANES
    weighting: Weighting | None = None
    repeats: int = 1

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
        turns, repeat = np.divmod(np.asarray(positions, dtype=np.int64), self.repeats)
        epochs, offsets = np.divmod(turns, self.num_samples)
        number, copy, lane = (np.zeros_like(offsets) for _ in range(3))
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            place, lane[here] = _cached_epoch(self, epoch)(offsets[here])
            if self.weighting:
                number[here], copy[here] = self.weighting.epoch(epoch).locate(place)
            else:
                number[here] = place
        copy = copy * self.repeats + repeat
        return SampleRefs(number, epochs, copy, np.ones(len(number), bool)), lane

    def positions_of(self, number: int, epochs: range) -> np.ndarray:
        """Where a sample stands in the stream in these epochs; int64, ascending.

        Once per epoch, or as often as the weighting has it. The inverse of `at`, by arithmetic:
        some ms per epoch and million shards.
        """
        turns = []
        for epoch in range(epochs.start // self.repeats, -(-epochs.stop // self.repeats)):
            places = np.array([number])
            if self.weighting:
                copies = self.weighting.epoch(epoch)
                places = copies.starts_of(places) + np.arange(copies.copies(places)[0])
            offsets = _cached_epoch(self, epoch).offsets_of(places)
            turns.append(epoch * self.num_samples + np.sort(offsets))
        if not turns:
            return np.zeros(0, np.int64)
        first = np.concatenate(turns).astype(np.int64) * self.repeats
        positions = (first[:, None] + np.arange(self.repeats)).ravel()
        return positions[np.isin(positions // self.num_samples, epochs)]

    def pieces_of(self, epoch: int) -> Pieces:
        """Where in the stream the samples of each shard may stand, in O(shards and lanes)."""
        number, part = divmod(epoch, self.repeats)
        shard, lane, first, last = _cached_epoch(self, number).pieces()
        # Of the pass, which takes `repeats` epochs, this epoch's part.
        start, size = number * self.repeats * self.num_samples, self.num_samples
        first = np.maximum(first * self.repeats, part * size)
        last = np.minimum((last + 1) * self.repeats, (part + 1) * size) - 1
        here = first <= last
        return Pieces(shard[here], lane[here], start + first[here], start + last[here])

    def place_in_batch(self, position: int) -> int:
        """At which place of its step's global batch a position of the stream comes."""
        step, own = divmod(position, self.global_batch_size)
        num_lanes = min(self.num_lanes, self.num_samples)
        if self.shuffle_buffer >= self.num_samples:
            num_lanes = 1
        positions = step * self.global_batch_size + np.arange(self.global_batch_size)
        lane = positions // self.repeats % self.num_samples % num_lanes
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
def _cached_epoch(order: TrainOrder, epoch: int) -> Uniform | Windowed:
    key = derive_key(order.seed, "epoch", epoch)
    sizes = np.asarray(order.sizes)
    if order.weighting:  # shards are as long as their samples' copies, so that locality holds
        sizes = np.diff(order.weighting.epoch(epoch).starts_of(shard_starts(sizes)))
    if order.shuffle_buffer >= order.num_samples:
        return Uniform(sizes, key)
    return Windowed(sizes, order.shuffle_buffer, order.num_lanes, key)
