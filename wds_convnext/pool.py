"""Independent tasks over a few processes.

Processes are spawned, not forked: nothing of the parent is copied, and threads are safe.
A worker whose parent dies, however it dies, ends itself.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import SynchronizedArray
from typing import TypeVar

from wds_convnext.errors import WdsConvnextError
from wds_convnext.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")
Count = Callable[[int, int], None]  # called with the units and bytes that have been dealt with

_POLL_S = 0.2
_worker_count: Count  # in a worker process: adds to the counters that the parent displays


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers(AbstractContextManager["Workers"]):
    """A few processes that run tasks; with one job, this process.

    Args:
        jobs: processes, started when first needed; None for one per CPU core. A script that
            wants more than one runs its work under `if __name__ == "__main__":`.
        on_start: called once in each process before its first task.
    """

    def __init__(self, jobs: int | None, *, on_start: Callable[[], None] | None = None):
        self.jobs = jobs or num_cores()
        self._on_start = on_start
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self,
        function: Callable[[Task, Count], Result],
        tasks: Sequence[Task],
        *,
        progress: Progress,
    ) -> list[Result]:
        """The result of `function(task, count)` for each task, in order.

        Args:
            function: a function of a module (it is sent to other processes by name). It calls
                `count(num, num_bytes)` as it goes along, with units of the progress.
            progress: is closed in the end.
        Raises:
            WdsConvnextError: if a process is killed. What a task raises comes out unchanged.
        """
        try:
            if self.jobs == 1:
                return [function(task, progress.add) for task in tasks]
            return self._run_pool(function, tasks, progress)
        except BrokenProcessPool:
            raise WdsConvnextError(
                "a worker process was killed (out of memory, or by a damaged file?). "
                "Run the same command again: it goes on where it stopped. Use fewer --jobs."
            ) from None
        finally:
            progress.close()

    def _run_pool(
        self, function: Callable[[Task, Count], Result], tasks: Sequence[Task], progress: Progress
    ) -> list[Result]:
        if self._pool is None:
            context = get_context("spawn")
            self._counters = context.Array("q", 2)
            start = (self._counters, self._on_start)
            self._pool = ProcessPoolExecutor(self.jobs, context, _start_worker, start)
        self._counters[:] = 0, 0
        futures = [self._pool.submit(_call, function, task) for task in tasks]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_S)
            progress.show(*self._counters[:])
            for future in done:
                future.result()
        return [future.result() for future in futures]

    def __exit__(self, *exception: object) -> None:
        """End the processes, after the tasks that are running; those not begun are left out."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _call(function: Callable[[Task, Count], Result], task: Task) -> Result:
    return function(task, _worker_count)


def _start_worker(counters: "SynchronizedArray[int]", on_start: Callable[[], None] | None) -> None:
    global _worker_count

    def add(num: int, num_bytes: int) -> None:
        with counters.get_lock():
            counters[0] += num
            counters[1] += num_bytes

    _worker_count = add
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if on_start is not None:
        on_start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
