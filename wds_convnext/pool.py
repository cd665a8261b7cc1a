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

from wds_convnext.errors import WdsConvnextError
from wds_convnext.progress import Progress

_POLL_S = 0.2
_worker_count = None  # in a worker process: adds to the counters that the parent displays


class Workers(AbstractContextManager):
    """A few processes that run tasks; with one job, this process.

    Args:
        jobs: processes, started when first needed; None for one per CPU core. A script that
            wants more than one runs its work under `if __name__ == "__main__":`.
        on_start: called once in each process before its first task.
    """

    def __init__(self, jobs: int | None, *, on_start: Callable[[], None] | None = None):
        self.jobs = jobs or os.cpu_count() or 1
        self._on_start = on_start
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable, tasks: Sequence, *, progress: Progress) -> list:
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
                "a worker process was killed (out of memory?). "
                "Run the same command again: it goes on where it stopped. Use fewer --jobs."
            ) from None
        finally:
            progress.close()

    def _run_pool(self, function: Callable, tasks: Sequence, progress: Progress) -> list:
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
            progress.show(*self._counters)
            for future in done:
                future.result()
        return [future.result() for future in futures]

    def __exit__(self, kind, error, traceback) -> None:
        """End the processes, after the tasks that are running; those not begun are left out."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _call(function, task):
    return function(task, _worker_count)


def _start_worker(counters, on_start) -> None:
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
    parent_process().join()
    os._exit(1)
