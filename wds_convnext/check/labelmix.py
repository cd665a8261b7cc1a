"""How well an order mixes classes, and how many shards it touches: known before a GPU is paid for.

Both follow from the labels and the order alone; no image is read.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from wds_convnext.stream.order import TrainOrder

_BATCHES_LOOKED_AT = 500  # spread over an epoch; the standard error is then below 1 %
_BUFFERS_COMPARED = (1_000, 10_000)
_MAX_POSITIONS = 400_000  # of the stream, looked at for one buffer


@dataclass(frozen=True)
class BufferMix:
    """What a size of the shuffle buffer gives."""

    shuffle_buffer: int
    classes_per_batch: float
    shards_opened: int  # by one rank, in the first `num_steps` steps


@dataclass(frozen=True)
class LabelMix:
    """Distinct classes per global batch for some sizes of the shuffle buffer."""

    global_batch_size: int
    world_size: int
    num_lanes: int
    num_steps: int
    expected_classes: float  # per batch of a uniform order
    buffers: tuple[BufferMix, ...]

    def lines(self) -> list[str]:
        batch = f"{self.global_batch_size:,}"
        lines = [
            f"label mix: distinct classes in a batch of {batch}; {self.expected_classes:.1f} in a "
            "uniform order",
            f"  {'shuffle buffer':>14}  {'classes':>7}  {'of uniform':>10}  "
            f"shards a rank opens in {self.num_steps:,} steps",
        ]
        for mix in self.buffers:
            share = mix.classes_per_batch / self.expected_classes
            lines.append(
                f"  {mix.shuffle_buffer:>14,}  {mix.classes_per_batch:>7.1f}  {share:>10.0%}  "
                f"{mix.shards_opened:,}"
            )
        return lines

    def to_json(self) -> dict:
        return asdict(self)


def measure_label_mix(
    labels: np.ndarray,
    sizes: np.ndarray,
    *,
    batch_size: int,
    shuffle_buffer: int,
    seed: int = 0,
    world_size: int = 1,
) -> LabelMix:
    """The label mix for the given buffer, for 1,000, for 10,000 and for a uniform order.

    Args:
        labels: of every sample in stored order, (N,).
        sizes: samples per shard, (num_shards,).
        batch_size: samples per batch and rank.
    """
    global_batch_size = batch_size * world_size
    num_samples = len(labels)
    wanted = (*_BUFFERS_COMPARED, shuffle_buffer, num_samples)
    # Four epochs tell as much as a thousand, and large batches would take long.
    num_positions = min(_MAX_POSITIONS, 4 * num_samples)
    num_steps = max(1, min(1_000, num_positions // global_batch_size))
    mixes = []
    for buffer in sorted({min(buffer, num_samples) for buffer in wanted}):
        order = TrainOrder(sizes, seed, global_batch_size, buffer)
        opened = shards_opened(
            order, num_steps=num_steps, batch_size=batch_size, world_size=world_size
        )
        mixes.append(BufferMix(buffer, classes_per_batch(labels, order), opened))
    expected = expected_classes(np.bincount(labels), global_batch_size)
    return LabelMix(
        global_batch_size=global_batch_size,
        world_size=world_size,
        num_lanes=order.num_lanes,
        num_steps=num_steps,
        expected_classes=expected,
        buffers=tuple(mixes),
    )


def expected_classes(class_counts: np.ndarray | Sequence[int], batch_size: int) -> float:
    """Expected distinct classes among `batch_size` samples drawn without replacement."""
    num_samples = int(sum(class_counts))
    batch_size = min(batch_size, num_samples)

    def log_choose(total: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(total - batch_size + 1)

    chosen = log_choose(num_samples)
    absent = (
        math.exp(log_choose(num_samples - count) - chosen)
        for count in map(int, class_counts)
        if count and num_samples - count >= batch_size
    )
    return np.count_nonzero(class_counts) - math.fsum(absent)


def classes_per_batch(labels: np.ndarray, order: TrainOrder) -> float:
    """Mean distinct classes of the global batches of the first epoch (of some, spread over it)."""
    batch_size = order.global_batch_size
    num_steps = max(1, order.num_samples // batch_size)
    num_batches = max(1, min(_BATCHES_LOOKED_AT, num_steps, _MAX_POSITIONS // batch_size))
    steps = np.arange(num_batches) * num_steps // num_batches
    refs, _ = order.at((steps[:, None] * batch_size + np.arange(batch_size)).ravel())
    batches = np.sort(labels[refs.number].reshape(num_batches, batch_size), axis=1)
    return 1 + float(np.mean(np.count_nonzero(np.diff(batches, axis=1), axis=1)))


def shards_opened(
    order: TrainOrder, *, num_steps: int, batch_size: int, world_size: int, max_open: int = 256
) -> int:
    """Shards that rank 0 opens in the first steps, keeping `max_open` open as `SampleReader` does.

    Each loader worker opens its own.
    """
    positions = np.arange(num_steps * order.global_batch_size)
    refs, lane = order.at(positions)
    by_step_and_lane = np.lexsort((lane, positions // order.global_batch_size))
    shard_of = np.searchsorted(np.cumsum(order.sizes), refs.number, side="right")
    shards = shard_of[by_step_and_lane].reshape(num_steps, -1)
    accumulate = order.global_batch_size // (batch_size * world_size)
    num_opened, is_open = 0, OrderedDict()
    for shard in shards[:, : accumulate * batch_size].ravel().tolist():
        if shard not in is_open:
            num_opened += 1
            is_open[shard] = True
            if len(is_open) > max_open:
                is_open.popitem(last=False)
        is_open.move_to_end(shard)
    return num_opened
