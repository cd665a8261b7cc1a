"""Training and evaluation in processes that are forked from one that has imported them already.

Importing torch and timm takes 6 s of the 7 s of a tiny run. The server never computes, so what
runs in its children is what runs in a process of its own.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.util import Finalize
from pathlib import Path

MODULES = ["preloaded", "wds_convnext.cli", "wds_convnext.training.train", "timm.models.convnext"]
_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()  # a test may run several commands at once, by a thread each


def _kill_those_left() -> None:
    for process in multiprocessing.active_children():
        if isinstance(process, _context.Process):
            process.kill()


# At exit, before multiprocessing waits for what a failed test has left.
Finalize(None, _kill_those_left, exitpriority=100)


class Started:
    """A process as `subprocess.Popen` would give it, whose output goes to files.

    Args:
        arguments: of the command line; ["-c", code, …] run a program, as they do for Python.
        new_session: whether it leads a process group, and stderr goes where stdout does.
    """

    def __init__(
        self, arguments: list[str], *, cwd=None, env: Mapping[str, str], new_session: bool
    ):
        with _starting:
            before = dict(os.environ)
            os.environ.update(env)  # OMP_NUM_THREADS counts when torch is imported
            try:
                _context.set_forkserver_preload(MODULES)
                forkserver.ensure_running()
            finally:
                os.environ.clear()
                os.environ.update(before)
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        names = ("stdout", "stdout") if new_session else ("stdout", "stderr")
        self._printed = [Path(self._folder.name, name) for name in names]
        for path in self._printed:
            path.touch()  # there even if the process fails before it prints
        self._process = _context.Process(
            target=_call, args=(arguments, cwd, dict(env), self._printed, new_session)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; gives what was printed."""
        self.wait(timeout)
        output, errors = (path.read_text() for path in self._printed)
        return output, errors


def run_preloaded(
    arguments: list[str], *, cwd, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """Call the command line with these arguments, as `subprocess.run` would in a new process."""
    process = Started(arguments, cwd=cwd, env=env, new_session=False)
    texts = process.communicate(timeout)
    return subprocess.CompletedProcess(arguments, process.returncode or 0, *texts)


def start_ranks(*commands: list[str], folders=None) -> list[Started]:
    """Ranks of this machine, which exchange by gloo: the arguments and the folder of each."""
    folders = folders or [None] * len(commands)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    size = str(len(commands))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [
        Started(
            arguments,
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            new_session=False,
        )
        for rank, (arguments, folder) in enumerate(zip(commands, folders, strict=True))
    ]


def _call(
    arguments: list[str], cwd, env: dict[str, str], printed: list[Path], new_session: bool
) -> None:
    if new_session:
        os.setsid()
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        multiprocessing.set_start_method(
            "fork", force=True
        )  # a forkserver's child inherits its own
        exec(compile(arguments[1], "<program>", "exec"), {"__name__": "__main__"})
    else:
        from wds_convnext.cli import main  # what fails in it is printed to the files

        sys.argv = ["wds-convnext", *arguments]
        main(arguments)
