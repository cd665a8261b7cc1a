"""How far the work is, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from wds_convnext.errors import printable

Item = TypeVar("Item")

_LINE_EVERY_S = 10.0
_COPIED = ("next: ", "wds-convnext ", "tensorboard ")
# tqdm's own, but for the rate, which tqdm turns into seconds per unit where it is below one.
_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:,.0f}/{total:,.0f} "
    "[{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)


class Progress(AbstractContextManager["Progress"]):
    """Shows the progress of one piece of work, with a rate and the time left.

    Args:
        total: of the units; None or 0 if it is not known.
        unit: plural, as "images".
        initial: what was done before this process began; it does not count for the rate.
        quiet: show nothing.
    """

    def __init__(
        self,
        title: str,
        *,
        total: float | None = None,
        unit: str = "images",
        initial: float = 0,
        quiet: bool = False,
    ):
        self.title, self.total = printable(title), total or None
        self.unit, self.note = unit, ""
        self.done, self.num_bytes = initial, 0
        self._initial, self._quiet = initial, quiet
        self._started = self._shown = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                desc=self.title,
                unit=f" {unit}",
                unit_scale=True,
                initial=initial,
                leave=False,  # what follows says what was done
                bar_format=_BAR if self.total else None,
            )

    @property
    def has_bar(self) -> bool:
        """Whether there is a bar on the screen, so that nobody else need say how far it is."""
        return self._bar is not None

    def add(self, num: float, num_bytes: int = 0) -> None:
        """Count units, and bytes where they are known, that have been dealt with."""
        self.show(self.done + num, self.num_bytes + num_bytes)

    def show(self, done: float, num_bytes: int = 0, *, note: str | None = None) -> None:
        """Set the counts, and a note that goes with them; display them when it is time."""
        step, self.done, self.num_bytes = done - self.done, done, num_bytes
        if note is not None:
            self.note = note
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._extras()), refresh=False)
            self._bar.update(step)
        elif not self._quiet and time.monotonic() - self._shown >= _LINE_EVERY_S:
            self._shown = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar from the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _extras(self) -> list[str]:
        extras = [self.note] if self.note else []
        if self.num_bytes:
            extras.insert(0, f"{self.num_bytes / self._elapsed_s() / 1e6:.0f} MB/s")
        return extras

    def _line(self) -> str:
        rate = (self.done - self._initial) / self._elapsed_s()
        of_total = f" of {int(self.total):,}" if self.total else ""
        parts = [f"{int(self.done):,}{of_total} {self.unit}", *self._extras()]
        parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        if self.total:
            left_s = f"{max(0, self.total - self.done) / rate:,.0f}" if rate else "?"
            parts.append(f"{left_s} s left")
        return f"{self.title}: {', '.join(parts)}"


def track(
    items: Iterable[Item],
    title: str,
    *,
    unit: str,
    total: int | None = None,
    quiet: bool = False,
) -> Iterator[Item]:
    """The items, with a display of how many have been dealt with.

    Args:
        total: default: the items' own length, if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total=total, unit=unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.add(1)


def say(text: str, *, wrap: bool = True) -> None:
    """Print text on stdout, above the bars that are on the screen."""
    tqdm.write(fit_terminal(text, sys.stdout) if wrap else text)
    sys.stdout.flush()


def warn(text: str) -> None:
    """Print a line on stderr, above the bars that are on the screen."""
    tqdm.write(fit_terminal(text, sys.stderr), file=sys.stderr)


def fit_terminal(text: str, stream: TextIO) -> str:
    """Break lines that are wider than the terminal between words; elsewhere text stays as it is.

    Commands are copied, so lines that begin with one or with `next:` stay whole.
    """
    if not stream.isatty():
        return text
    with suppress(OSError):
        if columns := os.get_terminal_size(stream.fileno()).columns:
            return "\n".join(
                line
                if line.lstrip().startswith(_COPIED)
                else textwrap.fill(
                    line,
                    columns,
                    subsequent_indent="    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for line in text.splitlines()
            )
    return text


@contextmanager
def outlasting_output() -> Iterator[None]:
    """Within this context stdout and stderr drop what cannot be written.

    Who reads them may go before the work is done: Ctrl-C ends `train | tee log` from the right, a
    terminal is closed, the disk of a log is full. That must not end a run that has yet to save.
    A thread that cannot write (TensorBoard's) hands its error on, and prints no traceback.
    """
    # Files that are opened later must not take the numbers of streams that are closed (2>&-).
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        _Outlasting(stream or os.fdopen(descriptor, "w", closefd=False))
        for descriptor, stream in enumerate(before, start=1)
    )
    hook, threading.excepthook = threading.excepthook, _print_unless_oserror
    try:
        yield
    finally:
        threading.excepthook = hook
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _print_unless_oserror(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


class _Outlasting:
    """A text stream whose failures are dropped, and with the first one all that follows."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, write: Callable[..., object], *args: str) -> None:
        try:
            write(*args)
        except OSError:
            # What is buffered is tried again, at last when Python ends: then it has to succeed.
            with suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
