"""Loaders in processes of their own, which measure themselves when they are asked to."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from wds_convnext.check.measure import measure_loader, tree_cpu_s
from wds_convnext.errors import DataError, WdsConvnextError

QUIET_S, MAX_QUIET_S = 0.3, 10
RESULT, FAILURE = "result: ", "failure: "


def measure_when_asked(start: Callable[[], Iterator], **options: int) -> None:
    """A loader in this process: its rate, CPU time and memory for each line on stdin.

    Does not wait for workers in the end, which are endless.

    Args:
        start: gives the loader's batches.
        options: of `measure_loader`.
    """
    try:
        batches = start()
        for _ in sys.stdin:
            cost = measure_loader(batches, **options)
            print(RESULT + json.dumps(asdict(cost)), flush=True)
    except Exception as error:  # peers raise nearly every type
        print(FAILURE + json.dumps(one_line(error)), flush=True)
    os._exit(0)


def wait_for_quiet() -> None:
    """Wait until the loaders started here have filled their queues again: some take seconds."""
    deadline, before = time.monotonic() + MAX_QUIET_S, tree_cpu_s()
    while time.monotonic() < deadline:
        time.sleep(QUIET_S)
        before, last = tree_cpu_s(), before
        if before is None or before - last <= 0.1 * QUIET_S:
            return


class Apart:
    """A loader in a process of its own, started with this one's arguments.

    Args:
        before: a checkout of another commit, which `before` is measured from.
    """

    def __init__(self, name: str, *, timeout_s: float, before: Path | None):
        command = [sys.executable, *sys.argv, "--one", name]
        package = {"PYTHONPATH": str(before.resolve())} if name == "before" and before else {}
        self._timeout_s, self._is_killed = timeout_s, False
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,
            env=os.environ | package,
        )

    def measure(self) -> dict:
        """Its cost in this round.

        Raises:
            DataError: why there is no result, in one line.
        """
        timer = threading.Timer(self._timeout_s, self.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write("\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(RESULT):  # libraries print, too
                    return json.loads(line[len(RESULT) :])
                if line.startswith(FAILURE):
                    raise DataError(json.loads(line[len(FAILURE) :]))
        finally:
            is_late = not timer.is_alive()
            timer.cancel()
        if is_late:
            raise DataError(f"no result after {self._timeout_s:.0f} s")
        exit_code = self._process.wait()
        self._complaints.seek(0)
        complaints = self._complaints.read().split("\n")
        reason = next((line for line in reversed(complaints) if line.strip()), "")
        raise DataError(reason if exit_code > 0 else f"ended by signal {-exit_code}: {reason}")

    def kill(self) -> None:
        """End it and its workers, which are endless."""
        if not self._is_killed:
            self._is_killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def one_line(error: Exception) -> str:
    """An error's type and message; of a traceback within the message, its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, WdsConvnextError):
        return " ".join(lines)
    return ": ".join([type(error).__name__, *lines[:1], *lines[1:][-1:]])
