"""When a run needs which shard: a pure function of its orders, some ms per epoch and 1,000 shards.

A plan per sample would cost 18 CPU minutes for 300 epochs of ImageNet-1k; lanes and windows bound
where the samples of a shard stand, so a use is a range of batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from wds_convnext.storage.schedule import Plan
from wds_convnext.stream.order import EvalOrder, TrainOrder, ValidationSchedule


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a cache, and how they load.

    Args:
        batch_size: samples per batch and rank.
        first, stop: the ranks of this node, of `world_size` in all.
    """

    batch_size: int
    first: int = 0
    stop: int = 1
    world_size: int = 1


@dataclass(frozen=True, eq=False)
class RunPlan:
    """A training run as batches of one rank: steps, and validations between them.

    Args:
        order: of the training samples; `val_order` of the validation samples, if there are any.
        schedule: after which steps the model is validated, and the last one.
    """

    order: TrainOrder
    ranks: Ranks
    schedule: ValidationSchedule
    val_order: EvalOrder | None = field(default=None)

    @cached_property
    def accumulate(self) -> int:
        """Batches of a rank per step."""
        return self.order.global_batch_size // (self.ranks.batch_size * self.ranks.world_size)

    @cached_property
    def num_val_batches(self) -> int:
        """Batches of a rank per validation; 0 without one."""
        if self.val_order is None:
            return 0
        ranks = self.ranks
        return self.val_order.num_micro_batches(
            batch_size=ranks.batch_size, world_size=ranks.world_size
        )

    @cached_property
    def validated_after(self) -> np.ndarray:
        """The numbers of steps after which the model is validated, ascending."""
        if self.val_order is None:
            return np.zeros(0, np.int64)
        last_step = self.schedule.last_step
        num_epochs = self.order.epoch_of(last_step) + 1
        ends = {self.order.num_steps(epoch) for epoch in range(1, num_epochs + 1)} | {last_step}
        due = [step for step in ends if 0 < step <= last_step and self.schedule.is_due(step)]
        return np.array(sorted(due), np.int64)

    def time_of(self, step: np.ndarray | int) -> np.ndarray:
        """How many batches come before those of a step, validations included."""
        passes = np.searchsorted(self.validated_after, step, side="right")
        return np.asarray(step) * self.accumulate + passes * self.num_val_batches

    def start(self, step: int, *, validates_first: bool) -> int:
        """The time at which a run goes on that has done so many steps."""
        return int(self.time_of(step)) - validates_first * self.num_val_batches

    def uses(self, *, from_step: int = 0) -> Plan:
        """When shards are needed; those of validation are numbered after those of training.

        The evaluation after the last step is part of it.
        """
        order, last_step = self.order, self.schedule.last_step
        stop = last_step * order.global_batch_size  # a batch may take from several epochs
        epochs = range(order.epoch_of(from_step), -(-stop // order.num_samples))
        nothing = np.zeros(0, np.int64)  # of a run whose steps are all done
        parts = [(nothing,) * 3, *(self._uses_of(epoch) for epoch in epochs)]
        shard, first, last = (np.concatenate(columns) for columns in zip(*parts))
        is_due = (last >= from_step) & (first < last_step)
        shard, first = shard[is_due], first[is_due]
        last = np.minimum(last[is_due], last_step - 1)
        uses = [(shard, self.time_of(first), self.time_of(last) + self.accumulate - 1)]
        if self.val_order is not None:
            starts = self.time_of(self.validated_after) - self.num_val_batches
            end = self.time_of(last_step)
            for start in [*starts[self.validated_after >= from_step], end]:
                shard, first, last = evaluation_uses(self.val_order, self.ranks)
                uses.append((len(order.sizes) + shard, start + first, start + last))
        return Plan.of(*(np.concatenate(columns) for columns in zip(*uses)))

    def _uses_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first and last step of each piece of an epoch that this node reads."""
        order, ranks = self.order, self.ranks
        pieces = order.pieces_of(epoch)
        batch = order.global_batch_size
        num_lanes = min(order.num_lanes, order.num_samples)
        is_ours = np.ones(len(pieces.shard), bool)
        if ranks.stop - ranks.first < ranks.world_size and order.shuffle_buffer < order.num_samples:
            # A global batch is sorted by lane and cut into ranks. It has batch / lanes samples of a
            # lane, and of so many lanes together up to lanes / 4 more or less; twice that where it
            # straddles two epochs.
            per_lane, slack = batch / num_lanes, order.repeats * num_lanes / 2
            begin = pieces.lane * per_lane - slack
            end = (pieces.lane + 1) * per_lane + slack
            share = batch / ranks.world_size
            is_ours = (begin < ranks.stop * share) & (end > ranks.first * share)
        return pieces.shard[is_ours], pieces.first[is_ours] // batch, pieces.last[is_ours] // batch


def evaluation_uses(order: EvalOrder, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shard, first and last batch of an evaluation, for all ranks together."""
    ends = np.cumsum(order.sizes)
    shard = np.flatnonzero(order.sizes)
    per_batch = ranks.batch_size * ranks.world_size
    first = (ends - order.sizes)[shard] // per_batch
    return shard, first, (ends[shard] - 1) // per_batch


def largest_buffer(plan: RunPlan, sizes: np.ndarray, cache_bytes: int, *, ahead: int) -> int | None:
    """The largest shuffle buffer, to two digits, whose live set fits a cache; None if none does.

    Args:
        sizes: bytes of the shards, those of validation after those of training.
    """

    def fits(buffer: int) -> bool:
        order = replace(plan.order, shuffle_buffer=buffer)
        schedule = ValidationSchedule(order, plan.schedule.every, plan.schedule.last_step)
        uses = RunPlan(order, plan.ranks, schedule, plan.val_order).uses()
        return uses.begun(ahead).peak_bytes(sizes) <= cache_bytes

    candidates = _round_numbers(min(plan.order.shuffle_buffer, plan.order.num_samples))
    low, high = 0, len(candidates)  # candidates[:low] fit, candidates[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(candidates[middle]) else (low, middle)
    return candidates[low - 1] if low else None


def _round_numbers(limit: int) -> Sequence[int]:
    """1, 2, … 10, 11, … 99, 100, 110, … below a limit."""
    numbers = [d * 10**e for e in range(18) for d in range(10 if e else 1, 100)]
    return [number for number in numbers if number < limit]
