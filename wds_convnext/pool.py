"""Independent tasks over a few processes, with one progress display.

Processes are spawned, not forked: nothing of the parent is copied, and threads are safe.
A worker whose parent dies, however it dies, ends itself.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context, parent_process

from tqdm import tqdm

from wds_convnext.errors import WdsConvnextError

_POLL_S = 0.2
_LINE_EVERY_S = 10.0
_worker_count = None  # in a worker process: adds to the counters that the parent displays


class Progress:
    """Shows one pass: a bar on a terminal, a line every ten seconds elsewhere; on stderr."""

    def __init__(self, title: str, *, num_images: int, quiet: bool = False):
        self.title = title
        self.num_images = num_images
        self.images = self.num_bytes = 0
        self._started = self._shown = time.monotonic()
        self._quiet = quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=num_images, desc=title, unit=" images", unit_scale=True)

    def add(self, images: int, num_bytes: int) -> None:
        """Count images and bytes that have been dealt with."""
        self.show(self.images + images, self.num_bytes + num_bytes)

    def show(self, images: int, num_bytes: int) -> None:
        """Set the counts, and display them when it is time."""
        step = images - self.images
        self.images, self.num_bytes = images, num_bytes
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        rate = f"{num_bytes / elapsed_s / 1e6:.0f} MB/s"
        if self._bar is not None:
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update(step)
        elif not self._quiet and time.monotonic() - self._shown >= _LINE_EVERY_S:
            self._shown = time.monotonic()
            left_s = elapsed_s * max(0, self.num_images - images) / max(1, images)
            print(
                f"{self.title}: {images:,} of {self.num_images:,} images, {rate}, "
                f"{images / elapsed_s:.0f} images/s, {left_s:.0f} s left",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


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
                `count(images, num_bytes)` as it goes along.
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

    def add(images: int, num_bytes: int) -> None:
        with counters.get_lock():
            counters[0] += images
            counters[1] += num_bytes

    _worker_count = add
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if on_start is not None:
        on_start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
