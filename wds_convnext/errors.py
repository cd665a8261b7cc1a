"""What a user can fix, as one line: what was found, what was expected, where, what to do.

The command line prints these without a traceback and exits with code 2.
Anything else that is raised is a bug and leaves as a traceback.
"""

import difflib
from collections.abc import Iterable


class WdsConvnextError(Exception):
    """Base of everything that is raised for a user or for data; as text one printable line."""

    def __str__(self) -> str:
        return printable(super().__str__(), limit=2000)


class UsageError(WdsConvnextError):
    """Options that do not fit each other, the data or the machine."""


class ShardError(WdsConvnextError):
    """A shard, its sidecar or its manifest is missing, damaged or inconsistent."""


class AbsentError(ShardError):
    """A store has no such object."""


class DataError(WdsConvnextError):
    """One sample is unusable: its image does not decode or its label has no meaning."""


class CheckpointError(WdsConvnextError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class TrainingError(WdsConvnextError):
    """The run cannot go on: a non-finite loss, too many bad samples, a lost process."""


def printable(text: str, *, limit: int = 200) -> str:
    """Foreign text (names, keys, paths, class names) as it may stand in one line of output.

    Whatever a terminal would act on, does not show, or cannot encode is written as an escape.
    Text over the limit loses its middle.
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() else _escape(char) for char in text)
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is not UTF-8, as `surrogateescape` keeps it
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def listing(names: Iterable[str], *, limit: int = 10) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def sentence(reason: object) -> str:
    """A reason with its full stop, so that advice may follow."""
    text = str(reason)
    return text if text.endswith(".") else f"{text}."


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A sentence naming the known words nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
