"""`make_loader`: a stream's batches, made by worker processes."""

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from wds_convnext.stream.stream import BadSample, Batch, Stream, load_batches
from wds_convnext.stream.workers import Slots, items_of_workers, num_workers


def make_loader(
    stream: Stream,
    *,
    workers: int | None = None,
    pin_memory: bool = False,
    while_waiting: Callable[[], None] = lambda: None,
) -> Generator[Batch, None, None]:
    """Iterate over a stream's batches, made by worker processes.

    Args:
        workers: 0 makes them in this process; by default one per CPU core, at most 16.
        pin_memory: whether the tensors are to lie in page-locked memory.
        while_waiting: called several times a second while a worker is awaited; may raise.
    Raises:
        WdsConvnextError: what a worker met, as it was raised there.
        TrainingError: if worker processes die again and again.
    """
    workers = num_workers(workers)
    if workers == 0:
        batches = load_batches(stream)
        yield from map(partial(_keep, pin_memory=True), batches) if pin_memory else batches
        return
    share = _Share(stream, Slots(workers, stream.new_images()), workers)
    with closing(items_of_workers(share, workers, while_waiting=while_waiting)) as items:
        for item in items:
            images = share.slots.images(item.worker, item.slot)
            rest = {name: torch.from_numpy(array) for name, array in item.arrays.items()}
            batch = Batch(images, bad_samples=item.bad_samples, **rest)
            yield _keep(batch, pin_memory=pin_memory)


def _keep(batch: Batch, *, pin_memory: bool) -> Batch:
    """The batch in memory of its own."""
    own = torch.Tensor.pin_memory if pin_memory else _copy
    tensors = {name: own(tensor) for name, tensor in batch.tensors.items()}
    return Batch(bad_samples=batch.bad_samples, **tensors)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # numpy keeps to this thread, where torch would wake one per core, and reuses large pages.
    return torch.from_numpy(tensor.numpy().copy(order="K"))


class _Handover(NamedTuple):
    """What crosses the pipe for a batch: where its images are, and the rest of it."""

    worker: int
    slot: int
    arrays: dict[str, np.ndarray]  # the batch's other tensors, by name
    bad_samples: list[BadSample]


@dataclass(frozen=True)
class _Share:
    """What runs in a worker: each num_workers-th batch of a stream, into its slots in turn."""

    stream: Stream
    slots: Slots
    num_workers: int

    def __call__(
        self, worker: int, first: int, wait_for_slot: Callable[[], int]
    ) -> Iterator[_Handover]:
        start = worker + first * self.num_workers
        turns = itertools.islice(self.stream.turns(), start, None, self.num_workers)
        slot: int

        def next_images() -> torch.Tensor:
            nonlocal slot
            slot = wait_for_slot()
            return self.slots.images(worker, slot)

        for batch in load_batches(self.stream, turns, next_images):
            arrays = {k: v.numpy() for k, v in batch.tensors.items() if k != "images"}
            yield _Handover(worker, slot, arrays, batch.bad_samples)
