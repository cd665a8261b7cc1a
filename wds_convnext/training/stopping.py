"""Stopping a run by a signal, between two batches, on all ranks alike.

Under torchrun, votes travel over a gloo group of their own, so that agreeing never waits for the
device.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from wds_convnext.errors import TrainingError, WdsConvnextError
from wds_convnext.stream.workers import STOP_SIGNALS
from wds_convnext.training.distributed import World

Item = TypeVar("Item")

STOPPED_EXIT_CODE = 75  # sysexits.h, EX_TEMPFAIL: stopped by a signal, to be run again


class Stopped(Exception):
    """Ends the wait for a batch, on all ranks alike, because one of them is to stop."""


class StopRequest:
    """Within this context the first stop signal is noted, with a line; a second one acts at once.

    A second SIGHUP does not: a terminal that is closed sends two, one of them through the shell.
    Under `nohup` SIGHUP stays ignored.

    Args:
        quiet: print no line.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signal_name: str | None = None
        self._quiet = quiet

    def __enter__(self) -> "StopRequest":
        signals = set(STOP_SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signals.remove(signal.SIGHUP)
        self._handlers = {s: signal.signal(s, self._note) for s in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(signum).name
        for again in self._handlers:
            signal.signal(again, signal.SIG_IGN if again == signal.SIGHUP else signal.SIG_DFL)
        if not self._quiet:
            _acknowledge(self.signal_name)

    @property
    def reason(self) -> str:
        """The signal that stopped the run."""
        return self.signal_name or "a signal to another process"

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.signal_name is not None:
            raise Stopped


def _acknowledge(signal_name: str) -> None:
    """Say on stderr that a signal came, from its handler: without Python's streams and tqdm's lock.

    The signal may have come while the interpreter was within them. On a terminal the line takes the
    place of the bar and of the `^C`; the bar comes again below it.
    """
    again = "Ctrl-C again" if signal_name == "SIGINT" else "a second one"
    text = f"Stopping after this batch ({signal_name}); {again} ends at once, unsaved."
    with suppress(OSError):  # who read it may be gone: `| tee log` ends of the same Ctrl-C
        before = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{before}{text}\n".encode())


class StopVote:
    """Hands out batches that all ranks have, as long as none of them is to stop.

    So all ranks stop at the same batch, before its step begins: when one got a signal, and when
    one cannot have its batch. A vote waits for the other hosts, not for the devices, over a gloo
    group of its own.
    """

    _GO_ON, _STOP, _FAIL = range(3)

    def __init__(self, request: StopRequest, world: World):
        self.request, self.world = request, world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    def agreed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches, of which each rank has as many.

        Raises:
            Stopped: on all ranks, if any got a stop signal.
            WdsConvnextError: on all ranks, if any cannot have its batch: there what it met.
        """
        while True:
            error: Exception | None = None
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (Stopped, WdsConvnextError) as met:
                error = met
            own = self._STOP if self.request.signal_name else self._GO_ON
            if isinstance(error, WdsConvnextError):
                own = self._FAIL
            vote = self._highest(own)
            if vote == self._FAIL:
                if isinstance(error, WdsConvnextError):
                    raise error
                raise TrainingError(
                    f"rank {self.world.rank}: another process cannot go on; its line says why."
                )
            if vote == self._STOP:
                raise Stopped
            yield batch

    def _highest(self, own: int) -> int:
        if self._group is None:
            return own
        ballot = torch.tensor([own])
        # The type of new_group has an int for processes outside the group; all are in this one.
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group)  # type: ignore[arg-type]
        return int(ballot)
