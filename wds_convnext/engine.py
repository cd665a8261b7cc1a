"""Engines: clusters that run the tasks of a conversion or a check, as `--engine` names them.

Any executor of `concurrent.futures` does; this makes one of a name. What is sent are values and
the names of functions; images are read and written by the workers, from folders that all see.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import wds_convnext
from wds_convnext.errors import UsageError, listing

CONNECT_S = 10


@contextmanager
def open_engine(name: str | None, executor: Executor | None = None) -> Iterator[Executor | None]:
    """The executor of an engine, or the one given; None for the processes of this machine.

    Args:
        name: `dask://HOST:PORT`, the address of a scheduler of Dask.
    Raises:
        UsageError: if the engine is unknown or not reached, or its workers differ from us.
    """
    if name is None or executor is not None:
        yield executor
        return
    scheme, _, address = name.partition("://")
    if scheme != "dask" or not address:
        raise UsageError(f"--engine {name}: no engine that is known. Give dask://HOST:PORT.")
    try:
        from distributed import Client
    except ImportError:
        raise UsageError(
            "--engine dask://… needs Dask, which is not installed. "
            "Install it: pip install 'wds-convnext[cluster]'."
        ) from None
    try:
        client = Client(f"tcp://{address}", timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--engine {name}: no scheduler answers there ({reason}). Start one: dask scheduler."
        ) from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the one line says it
    with client:
        _check_versions(name, client)
        yield client.get_executor()


def shared_path(path: str, *, is_shared: bool) -> str:
    """A path as other machines need it, which work in other folders; unchanged if not `is_shared`.

    Raises:
        UsageError: for a glob or a list of relative paths.
    """
    if not is_shared or os.path.isabs(path) or "://" in path:
        return path
    if not os.path.exists(path):
        raise UsageError(f"{path}: with an engine, globs and lists need absolute paths.")
    return os.path.abspath(path)


def _check_versions(name: str, client: Any) -> None:
    """Other code may write other bytes, which nothing would notice before they are compared."""
    own = wds_convnext.__version__
    found = client.run(_version, on_error="return")
    others = {worker: text for worker, text in found.items() if text != own}
    if others:
        shown = listing(f"{worker}: {text}" for worker, text in others.items())
        raise UsageError(
            f"--engine {name}: its workers run another version than this one, {own} ({shown}). "
            "Install the same on all."
        )


def _version() -> str:
    return wds_convnext.__version__
