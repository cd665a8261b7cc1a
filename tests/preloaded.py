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
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

MODULES = ["preloaded", "wds_convnext.cli", "wds_convnext.training.train", "timm.models.convnext"]
_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()  # ranks of a run are started by a thread each


def run_preloaded(
    arguments: list[str], *, cwd, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """Call the command line with these arguments, as `subprocess.run` would in a new process.

    Arguments ["-c", code, …] run a program instead, as they do for Python.
    """
    with _starting:
        before = dict(os.environ)
        os.environ.update(env)  # OMP_NUM_THREADS counts when torch is imported
        try:
            _context.set_forkserver_preload(MODULES)
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _context.Process(target=_call, args=(arguments, cwd, env, printed))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        texts = [path.read_text() for path in printed]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def run_ranks(
    *commands: list[str], folders: tuple[Path | None, ...] = (None, None), timeout: float
) -> list[subprocess.CompletedProcess]:
    """Ranks of this machine, which exchange by gloo: the arguments and the folder of each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    size = str(len(commands))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}

    def run_rank(rank: int) -> subprocess.CompletedProcess:
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_preloaded(commands[rank], cwd=folders[rank], env=env, timeout=timeout)

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(run_rank, range(len(commands))))


def _call(arguments: list[str], cwd, env: dict[str, str], printed: list[Path]) -> None:
    from wds_convnext.cli import main

    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
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
        sys.argv = ["wds-convnext", *arguments]
        main(arguments)
