"""What is wrong with shards, where more than one thing may be."""

from typing import NamedTuple

from wds_convnext.errors import WdsConvnextError, printable

_MAX_LISTED = 20


class Problem(NamedTuple):
    """One thing that is wrong with a file; as text one line."""

    path: str
    what: str

    @classmethod
    def of(cls, path: str, error: WdsConvnextError) -> "Problem":
        """The problem that an error about a file describes."""
        return cls(path, str(error).removeprefix(printable(path, limit=2000)).lstrip(":, "))

    def __str__(self) -> str:
        joint = ", " if self.what.startswith("key ") else ": "
        return printable(f"{self.path}{joint}{self.what}", limit=2000)


def shorten(problems: list[Problem]) -> list[Problem]:
    """The first few of a file's problems, and how many more there are."""
    more = len(problems) - _MAX_LISTED
    if more <= 0:
        return problems
    return [*problems[:_MAX_LISTED], Problem(problems[0].path, f"{more:,} more such problems")]
