"""A loader's worker processes, and the memory in which their batches cross to the trainer.

Each worker fills its slots in turn, in place, and hands over a slot's number. It takes a slot again
only when the trainer has copied the batch in it. The pages are touched for the first time once, not
once a batch: fresh shared memory for each batch cost 0.09 ms an image (of 1.4), and three file
descriptors.

A batch is a function of its number. So a worker that dies is started again, from the first batch
that it has not handed over, and nobody can tell from the batches.

Processes, not threads: with two workers threads are 2 % slower, and one next to the trainer makes
each small operation of its interpreter take 2.1 us instead of 1.7 (99th percentile 5, not 2).
Tried and lost, with two workers (n = 5 to 9): handing out the slots themselves saves 1.2 % and
needs a way to give them back; resizing straight into the slot, numpy's copy into it, and no garbage
collection gain nothing.
"""

import gc
import itertools
import math
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Generic, TypeVar

import torch

from wds_convnext.errors import TrainingError, UsageError, WdsConvnextError
from wds_convnext.pool import num_cores
from wds_convnext.progress import warn

Item = TypeVar("Item")

NUM_SLOTS = 3  # batches of a worker: one that is made, two that wait; torch's default
MAX_RESTARTS = 10  # of all workers of a loader; more deaths have a cause that stays

# fork shares the memory of imports and starts in 0.1 s; workers never touch CUDA.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.2
_ORPHAN_POLL_S = 5
_ADVICE = "The usual cause is memory: use fewer --workers or a smaller --batch-size."

# (worker, number of its first item, a function that waits for a free slot and gives its number)
# -> the worker's items, one for each slot that it asked for.
Work = Callable[[int, int, Callable[[], int]], Iterator[Item]]


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


def batches_ahead(workers: int) -> int:
    """How many batches a loader may have begun beyond those that it has handed over."""
    return max(1, workers) * (NUM_SLOTS + 1)  # of the next ones the bytes are asked for


class Slots:
    """NUM_SLOTS image batches per worker, like one that is given, channels_last.

    Raises:
        TrainingError: if there is not so much memory.
    """

    def __init__(self, num_workers: int, images: torch.Tensor):
        shape = (num_workers, NUM_SLOTS, *images.permute(0, 2, 3, 1).shape)
        num_bytes = math.prod(shape) * images.element_size()
        try:
            if START_METHOD == "fork":
                # Inherited, and not part of /dev/shm, which containers keep small.
                memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=images.dtype)
            else:
                memory = torch.empty(math.prod(shape), dtype=images.dtype).share_memory_()
        except (OSError, OverflowError, RuntimeError) as error:
            raise TrainingError(
                f"The loader's {num_workers} workers need {num_bytes / 1e9:.1f} GB for their "
                f"batches ({str(error).splitlines()[0]}). {_ADVICE}"
            ) from None
        self._images = memory.view(shape)

    def images(self, worker: int, slot: int) -> torch.Tensor:
        """The slot itself, to write to."""
        return self._images[worker, slot].permute(0, 3, 1, 2)


def items_of_workers(
    work: Work[Item], num_workers: int, *, while_waiting: Callable[[], None]
) -> Generator[Item, None, None]:
    """What the workers yield, in turn; an item's slot is free again when the next is asked for.

    Args:
        while_waiting: called several times a second while an item is awaited; may raise.
    Raises:
        TrainingError: if worker processes die again and again, or cannot be started.
        WdsConvnextError: what a worker met, as it was raised there. A bug is a RuntimeError.
    """
    restarts, workers = itertools.count(1), list[_Worker[Item]]()
    try:
        for number in range(num_workers):
            workers.append(_Worker(work, number, restarts))
        for worker in itertools.cycle(workers):
            item = worker.take(while_waiting)
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
            worker.free_slot()
    finally:
        for worker in workers:
            worker.kill()


class _Worker(Generic[Item]):
    """The trainer's side of a worker: a process, and another in its place if it dies."""

    def __init__(self, work: Work[Item], number: int, restarts: Iterator[int]):
        self._work, self._number, self._restarts = work, number, restarts
        self._num_taken = 0
        self._start()

    def take(self, while_waiting: Callable[[], None]) -> Item | Exception | None:
        """The worker's next item, or an exception that it met; None if there are no more."""
        while True:
            try:
                while not self._connection.poll(_POLL_S):
                    while_waiting()
                item = self._connection.recv()
            except (EOFError, OSError):  # it died; OSError while it handed an item over
                self._restart()
            else:
                self._num_taken += 1
                return item

    def free_slot(self) -> None:
        """Say that the slot of the item taken first, of those not freed, may be written to."""
        with suppress(OSError):  # it died; `take` deals with that
            self._connection.send(None)

    def kill(self) -> None:
        self._kill_process()
        self._connection.close()

    def _start(self) -> None:
        context = get_context("fork") if START_METHOD == "fork" else get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_run,
            args=(self._work, self._number, self._num_taken, theirs, os.getpid()),
            daemon=True,
        )
        try:
            with _stop_signals_blocked():
                self._process.start()
        except OSError as error:
            raise TrainingError(
                f"A loader worker cannot be started ({error.strerror}). {_ADVICE}"
            ) from None
        finally:
            theirs.close()  # so that the process's death ends the connection
        # When a process ends, multiprocessing waits for its children after a SIGTERM, which these
        # ignore: without this neither a traceback nor a child with an open loader would end.
        self._kill_process = Finalize(None, _kill, (self._process,), exitpriority=100)

    def _restart(self) -> None:
        self.kill()
        code = self._process.exitcode
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        if (restart := next(self._restarts)) > MAX_RESTARTS:
            raise TrainingError(
                f"A loader worker died ({how}), after {MAX_RESTARTS} that were started again. "
                f"{_ADVICE}"
            )
        warn(
            f"A loader worker died ({how}); it is started again, and its batches are made again "
            f"(restart {restart} of at most {MAX_RESTARTS})."
        )
        self._start()


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


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join(_ORPHAN_POLL_S)  # one that waits for a dead disk is not waited for


def _run(work: Work[Item], number: int, first: int, connection: Connection, trainer: int) -> None:
    """The life of a worker process: it sends items, at the end None or what it met."""
    _settle_in()
    wait_for_slot = _free_slots(connection, trainer).__next__
    last: Exception | None = None
    try:
        for item in work(number, first, wait_for_slot):
            _send(connection, item)
    except WdsConvnextError as error:
        last = error
    except MemoryError:
        last = TrainingError(f"A loader worker ran out of memory. {_ADVICE}")
    except Exception:
        last = RuntimeError(f"In a loader worker: {traceback.format_exc()}")
    _send(connection, last)


def _settle_in() -> None:
    # The trainer decides when to stop; a signal to its whole process group must not kill these.
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)  # the workers share the cores
    # A collection would write to, and so copy, every object that the fork shares: 40 MB a worker.
    gc.freeze()


def _send(connection: Connection, item: object) -> None:
    try:
        connection.send(item)
    except OSError:
        sys.exit()  # the trainer is gone


def _free_slots(connection: Connection, trainer: int) -> Iterator[int]:
    """The numbers of the slots in turn, each when it may be written to."""
    for turn in itertools.count():
        if turn >= NUM_SLOTS:
            # With fork, later workers hold the trainer's end too, so it need not end with it.
            while not connection.poll(_ORPHAN_POLL_S):
                if os.getppid() != trainer:
                    sys.exit()
            try:
                connection.recv()
            except (EOFError, OSError):
                sys.exit()
        yield turn % NUM_SLOTS
