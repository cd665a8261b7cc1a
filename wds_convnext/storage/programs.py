"""The two programs that talk to stores: started, and started again.

They are spawned, not forked: clients of stores do not survive a fork.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import wds_convnext
from wds_convnext import errors
from wds_convnext.errors import ShardError
from wds_convnext.files import write_atomically
from wds_convnext.progress import warn
from wds_convnext.storage.layout import COUNTS, GAVE_UP

_MAX_RESTARTS = 10  # without a byte fetched in between
_POLL_S = 0.1
_PROGRAM = ["-P", "-m"]


def ask(request: dict) -> dict:
    """What `asking` answers to a request, from a process of its own.

    Raises:
        WdsConvnextError: of the kind that it met there.
    """
    done = subprocess.run(
        [sys.executable, *_PROGRAM, "wds_convnext.storage.asking", str(os.getpid())],
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        env=_environment(),
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ShardError(
            f"{request['url']}: the process that asks for it died (exit code {done.returncode}). "
            "Run the same command again."
        ) from None
    if "error" in answer:
        raise getattr(errors, answer["kind"], ShardError)(answer["error"])
    return answer


class Supervisor:
    """Starts the fetcher, and starts it again when it dies."""

    def __init__(self, path: Path, cache_bytes: int, timeout_s: float):
        self._path = path
        self._args = [str(path), str(os.getpid()), str(cache_bytes), str(timeout_s)]
        self._is_closing = False
        self._changing = threading.Lock()
        self._pid = self._start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self) -> int:
        # Not subprocess: its pipe to the child would be inherited by a loader worker that another
        # thread forks at this moment, and waited for. In a process group of its own, so that a
        # terminal's Ctrl-C leaves it alone: the run may have to wait for a shard before it stops.
        return os.posix_spawn(
            sys.executable,
            [sys.executable, *_PROGRAM, "wds_convnext.storage.fetcher", *self._args],
            _environment(),
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setpgroup=0,
            setsigmask=(),
        )

    def _watch(self) -> None:
        deaths, bytes_then = 0, -1
        while True:
            try:
                _, status = os.waitpid(self._pid, 0)
            except ChildProcessError:  # somebody else in this process waits for all its children
                status = 1 << 8
            code = os.waitstatus_to_exitcode(status)
            with self._changing:
                if self._is_closing or code == GAVE_UP:
                    self._is_closing = True
                    return
                fetched, *_ = COUNTS.unpack((self._path / "counts").read_bytes())
                deaths, bytes_then = 1 if fetched != bytes_then else deaths + 1, fetched
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                if deaths > _MAX_RESTARTS:
                    write_atomically(
                        self._path / "failed",
                        f"The fetcher of remote shards died {deaths} times ({how}) without a byte "
                        "fetched. The usual cause is memory. Then continue with --resume.".encode(),
                    )
                    self._is_closing = True
                    return
                warn(f"The fetcher of remote shards died ({how}); it is started again.")
                self._pid = self._start()

    def close(self) -> None:
        with self._changing:
            if not self._is_closing:
                self._is_closing = True
                with contextlib.suppress(ProcessLookupError):  # it has just died
                    os.kill(self._pid, signal.SIGKILL)


def end_with(owner: int) -> None:
    """End this process when its parent, which is `owner`, is gone."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _environment() -> dict[str, str]:
    """Ours, and where this package is: `-P` leaves out the working directory."""
    package = str(Path(wds_convnext.__file__).parent.parent)
    rest = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": package + (os.pathsep + rest if rest else "")}
