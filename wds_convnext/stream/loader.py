"""`make_loader`: a stream's batches, made by worker processes."""

import itertools
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from wds_convnext.stream.sizes import in_memory_of
from wds_convnext.stream.stream import BadSample, Batch, Stream, load_batches
from wds_convnext.stream.workers import Slots, items_of_workers, num_workers

_LARGE = 1 << 16  # bytes; less comes from malloc's own memory
_MAX_COPIES = 4  # whose memory may be used again; a trainer that takes one by one needs two


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
        pinned = partial(_keep, own=torch.Tensor.pin_memory)
        yield from map(pinned, batches) if pin_memory else batches
        return
    share = _Share(stream, Slots(workers, stream.new_images()), workers)
    own = torch.Tensor.pin_memory if pin_memory else _Copies().copy
    with closing(items_of_workers(share, workers, while_waiting=while_waiting)) as items:
        for item in items:
            images = in_memory_of(share.slots.images(item.worker, item.slot), item.shape)
            rest = {name: torch.from_numpy(array) for name, array in item.arrays.items()}
            batch = Batch(images, bad_samples=item.bad_samples, **rest)
            yield _keep(batch, own=own)


def _keep(batch: Batch, *, own: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch in memory of its own."""
    tensors = {name: own(tensor) for name, tensor in batch.tensors.items()}
    return Batch(bad_samples=batch.bad_samples, **tensors)


class _Copies:
    """Copies tensors, into the memory of copies before that nobody holds any more.

    New memory is paid for in page faults: 1.8 ms for 32 images of 224 px, where this takes 0.9, and
    22.0 ms for 160, where this takes 15.8 (a busy core, medians of 24).
    """

    def __init__(self) -> None:
        # Memory of the last few copies, and what lives as long as anything is a view of it.
        self._copies: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        array = tensor.numpy()  # numpy keeps to this thread, where torch would wake one per core
        if array.nbytes < _LARGE:
            return torch.from_numpy(array.copy(order="K"))
        for place, (own, held) in enumerate(self._copies):
            if held() is None and own.shape == array.shape and own.dtype == array.dtype:
                np.copyto(own, array)
                del self._copies[place]
                break
        else:
            own = array.copy(order="K")
        view = own.view()
        self._copies = [*self._copies, (own, weakref.ref(view))][-_MAX_COPIES:]
        return torch.from_numpy(view)


class _Handover(NamedTuple):
    """What crosses the pipe for a batch: where its images are, and the rest of it."""

    worker: int
    slot: int
    shape: tuple[int, ...]  # of the images, which may be less than the slot
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
            shape = tuple(batch.images.shape)
            yield _Handover(worker, slot, shape, arrays, batch.bad_samples)
