"""What a user can fix, as one line: what was found, what was expected, where, what to do.

The command line prints these without a traceback and exits with code 2.
Anything else that is raised is a bug and leaves as a traceback.
"""

import difflib
from collections.abc import Iterable


class WdsConvnextError(Exception):
    """Base of everything that is raised for a user or for data."""


class UsageError(WdsConvnextError):
    """Options that do not fit each other, the data or the machine."""


class ShardError(WdsConvnextError):
    """A shard, its sidecar or its manifest is missing, damaged or inconsistent."""


class DataError(WdsConvnextError):
    """One sample is unusable: its image does not decode or its label has no meaning."""


class CheckpointError(WdsConvnextError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class TrainingError(WdsConvnextError):
    """The run cannot go on: a non-finite loss, too many bad samples, a lost process."""


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A sentence naming the known words nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
