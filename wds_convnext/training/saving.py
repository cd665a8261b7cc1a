"""Saving while training goes on: a copy of the state on the host, and one thread that writes it.

The thread holds the interpreter while it takes checksums: of 1.1 GB in pieces of 16 MB, written in
7.6 and 8.7 s, a loop in the main thread lost 3.2 and 3.7 s, at most 16 ms at once (n = 2, with
other jobs stopped).
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from wds_convnext.errors import CheckpointError


def copy_to_host(state: Any) -> Any:
    """A deep copy of a state (dicts, lists, tuples, plain values) whose tensors are on the CPU.

    What is one object or one piece of memory in the state is one in the copy, so a file of either
    holds the same bytes. The host waits for the device here.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}  # what `deepcopy` takes for done, by the id of the original
    for tensor in _tensors_of(state):
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:  # by which torch.save, too, knows one piece of memory
            on_host = tensor.device.type == "cpu"
            storages[storage._cdata] = storage.clone() if on_host else storage.cpu()
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
            storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
        )
    return copy.deepcopy(state, copies)


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors_of(value)


class Writer:
    """A thread that does one thing at a time, such as writing a checkpoint.

    What fails is raised where it is next waited for: by `start`, by `wait`, or at the end of the
    context, after which nothing can be started. An error within the context goes before it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin something, once the thing before is done.

        Raises:
            CheckpointError: if the thing before failed; this one is then not begun.
        """
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for what was started last.

        Raises:
            CheckpointError: if it failed, and that was not yet raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with contextlib.suppress(*[CheckpointError] if error else []):
                self.wait()
        finally:
            self._thread.shutdown()
