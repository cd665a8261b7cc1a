"""A loader's worker processes, and the memory in which their batches cross to the trainer.

Each worker fills its slots in turn, in place, and hands over a slot's number. The DataLoader asks
a worker for a batch only when one of its last PREFETCH has been taken, so with one slot more than
that none is overwritten before it was copied out. The pages are touched for the first time once,
not once a batch: fresh shared memory for each batch cost 0.09 ms an image (of 1.4), and three file
descriptors.

Processes, not threads: with two workers threads are 2 % slower, and one beside the trainer makes
each small operation of its interpreter take 2.1 us instead of 1.7 (99th percentile 5, not 2).
Tried and lost, with two workers (n = 5 to 9): handing out the slots themselves saves 1.2 % and
needs a way to give them back; resizing straight into the slot, numpy's copy into it, and no garbage
collection gain nothing.
"""

import atexit
import gc
import math
import mmap
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from wds_convnext.errors import TrainingError, UsageError

PREFETCH = 2  # batches a worker is ahead by; torch's default

# fork shares the memory of imports and starts in 0.1 s; workers never touch CUDA.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def num_workers(asked_for: int | None, *, ranks: int = 1) -> int:
    """Loader processes of each of so many ranks: as asked for, else one per core, at most 16.

    Raises:
        UsageError: if they are more than four per core.
    """
    cores = num_cores()
    if asked_for is None:
        return max(1, min(16, cores // ranks))
    if asked_for > 4 * cores:
        raise UsageError(
            f"--workers {asked_for}: this machine has {cores} CPU cores, so they would only take "
            f"turns. Use at most {4 * cores}; {cores} is usual."
        )
    return asked_for


class Slots:
    """PREFETCH + 1 image batches per worker, like one that is given, channels_last."""

    def __init__(self, num_workers: int, images: torch.Tensor):
        shape = (num_workers, PREFETCH + 1, *images.permute(0, 2, 3, 1).shape)
        if START_METHOD == "fork":
            # Inherited, and not part of /dev/shm, which containers keep small.
            num_bytes = math.prod(shape) * images.element_size()
            memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=images.dtype)
        else:
            memory = torch.empty(math.prod(shape), dtype=images.dtype).share_memory_()
        self._images = memory.view(shape)

    def __len__(self) -> int:
        return PREFETCH + 1

    def images(self, worker: int, slot: int) -> torch.Tensor:
        """The slot itself, to write to."""
        return self._images[worker, slot].permute(0, 3, 1, 2)


def items_of_workers(dataset: IterableDataset, num_workers: int) -> Iterator[Any]:
    """What the copies of a data set in worker processes yield, in turn, pickled as it is.

    Raises:
        TrainingError: if a worker process died.
    """
    try:
        yield from _start(dataset, num_workers)
    except (RuntimeError, EOFError, ConnectionError) as error:
        # EOFError and ConnectionError: it died while it handed a batch over.
        if type(error) is RuntimeError and not _WORKER_DIED.match(str(error)):
            raise
        raise TrainingError(
            f"A loader worker died ({str(error) or type(error).__name__}). The usual cause is "
            "memory: use fewer --workers or a smaller --batch-size. The last checkpoint is whole."
        ) from None


def _as_it_is(item: Any) -> Any:
    return item


def _start(dataset: IterableDataset, num_workers: int) -> Iterator[Any]:
    """The processes' items, with a death among them met where one is awaited, and nowhere else.

    PyTorch's handler of SIGCHLD raises at whatever line this process is, so also inside an
    optimizer update. Without it, waiting looks every 5 s whether the workers live.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings(), _stop_signals_blocked():
        # More workers than cores are refused, or meant, before this.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        items = iter(
            DataLoader(
                dataset,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=num_workers,
                prefetch_factor=PREFETCH,
                worker_init_fn=_settle_in,
                multiprocessing_context=START_METHOD,
            )
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    # At exit multiprocessing waits for its children after a SIGTERM, which these ignore: without
    # this a process that ends by a traceback never ends. Registered last, it is called first.
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)
    return items


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Hold stop signals back, here and in processes started here until they `_settle_in`.

    One that reaches the whole process group would else kill a worker that does not ignore it yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _settle_in(worker_id: int) -> None:
    # The trainer decides when to stop; a signal to its whole process group must not kill these.
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # A collection would write to, and so copy, every object that the fork shares: 40 MB a worker.
    gc.freeze()
