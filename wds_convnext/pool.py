"""Independent tasks over a few processes, or over those of an engine.

Processes are spawned, not forked: nothing of the parent is copied, and threads are safe.
A worker whose parent dies, however it dies, ends itself. An engine is any executor of
`concurrent.futures`; its workers may be on other machines, and may be lost.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, TypeVar

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
        on_start: called once in each process before its first task; not by an executor.
        executor: runs the tasks instead. It is not shut down.
    """

    def __init__(
        self,
        jobs: int | None,
        *,
        on_start: Callable[[], None] | None = None,
        executor: Executor | None = None,
    ):
        self.jobs = jobs or num_cores()
        self._on_start = on_start
        self._executor = executor
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
            WdsConvnextError: if a process is killed, or the executor fails. What a task raises
                comes out unchanged.
        """
        try:
            if self._executor is not None:
                return _run_elsewhere(self._executor, function, tasks, progress)
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


@dataclass
class _Outcome:
    """What came of a task elsewhere: its result or its error, and how much it counted."""

    result: Any = None
    error: Exception | None = None
    num: int = 0
    num_bytes: int = 0

    def count(self, num: int, num_bytes: int) -> None:
        self.num += num
        self.num_bytes += num_bytes


def _call_elsewhere(function: Callable[[Task, Count], Result], task: Task) -> _Outcome:
    outcome = _Outcome()
    try:
        outcome.result = function(task, outcome.count)
    except Exception as error:  # so that whatever else is raised is the executor's
        outcome.error = error
    return outcome


def _run_elsewhere(
    executor: Executor,
    function: Callable[[Task, Count], Result],
    tasks: Sequence[Task],
    progress: Progress,
) -> list[Result]:
    """As `Workers.run`; progress by finished task."""
    futures: list[Future[_Outcome]] = []
    failed = None
    try:
        futures += [executor.submit(_call_elsewhere, function, task) for task in tasks]
        pending = set(futures)
        while pending and failed is None:
            done, pending = wait(pending, timeout=_POLL_S)
            outcomes = [future.result() for future in done]
            counts = [(outcome.num, outcome.num_bytes) for outcome in outcomes]
            progress.add(*map(sum, zip((0, 0), *counts)))
            failed = next((outcome.error for outcome in outcomes if outcome.error), None)
    except (Exception, asyncio.CancelledError) as error:
        raise WdsConvnextError(
            f"the engine failed ({type(error).__name__}: {error}). Run the same command again: "
            "it goes on where it stopped."
        ) from error
    finally:
        for future in futures:
            future.cancel()
    if failed is not None:
        raise failed
    return [future.result().result for future in futures]


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
