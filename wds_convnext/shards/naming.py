"""Files by name: those that a glob matches, and what a name says of split and series."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_PURPOSES = {  # by words of a split's name; of several splits for one purpose the first is taken
    "train": ("train", "training", "trainset", "trainval", "trn"),
    "validation": (
        *("validation", "val", "valid", "validate", "valset", "minival"),
        *("dev", "devel", "development", "devset", "eval", "evals", "evaluation", "evalset"),
    ),
    "test": ("test", "tests", "testing", "testset", "heldout"),
}
MAX_FILES = 1_000_000  # of a series; a larger total is part of a name
_NUMBERED = re.compile(
    r"(?P<stem>.*?)(?P<joint>[-_.]?)(?P<number>\d+)-of-(?P<total>\d+)(?P<rest>-[0-9a-f]{6,})?"
)


def find_files(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; hidden ones only if the glob names the dot.

    Folders that are there by the very name count as such, so brackets in them are no pattern.
    """
    prefix, names = "", pattern.split("/")
    while len(names) > 1 and os.path.isdir(prefix + names[0] + "/"):
        prefix += names.pop(0) + "/"
    found = glob.glob(glob.escape(prefix) + "/".join(names), recursive=True)
    return sorted(path for path in found if os.path.isfile(path))


def purpose(split: str) -> str | None:
    """What the words of a split's name say: "train", "validation" or "test"; None if nothing.

    `mydata_test`, `testA`, `VAL2017` and `imagenet-validation` are held out, `valley` is not.
    """
    words = set(_words(split))
    return next((name for name, known in _PURPOSES.items() if words.intersection(known)), None)


def _words(split: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", split)]


def counterpart(split: str, others: Iterable[str], *, use: str) -> str | None:
    """The split for a use that belongs to a training split: `a-train` -> `a-val`, else `val`.

    Args:
        use: "validation" or "test".
    """
    words = [*_PURPOSES["train"], *_PURPOSES[use]]
    own = [word for word in _words(split) if word not in words]
    held_out = [other for other in others if purpose(other) == use]
    for rest in (own, []):
        fitting = [o for o in held_out if [w for w in _words(o) if w not in words] == rest]
        if fitting:
            return min(fitting, key=lambda o: min(words.index(w) for w in _words(o) if w in words))
    return None


def is_held_out(split: str) -> bool:
    """Whether a split is for validation or test, and so keeps its stored order."""
    return purpose(split) in ("validation", "test")


class Numbered(NamedTuple):
    """A name such as `train-00003-of-00013.tar`, taken apart."""

    folder: str
    stem: str
    joint: str  # between stem and number
    number: int
    total_digits: str
    num_digits: int
    extension: str

    @property
    def total(self) -> int:
        return int(self.total_digits)

    def sibling(self, number: int) -> str:
        """The name of another file of the series."""
        digits = f"{number:0{self.num_digits}d}"
        name = f"{self.stem}{self.joint}{digits}-of-{self.total_digits}{self.extension}"
        return os.path.join(self.folder, name)


def parse_numbered(path: str) -> Numbered | None:
    """The parts of a name that states its number and how many there are, else None.

    The hash that older versions of Hugging Face's datasets append, another for each file, is
    left out.
    """
    folder, name = os.path.split(path)
    base, extension = os.path.splitext(name)
    match = _NUMBERED.fullmatch(base)
    if match is None:
        return None
    stem, joint, number, total, _ = match.groups()
    return Numbered(folder, stem, joint, int(number), total, len(number), extension)


def missing_siblings(paths: Iterable[str]) -> Iterator[str]:
    """The files that numbered series lack, in order; numbers count from 0, or from 1."""
    series: dict[Numbered, set[int]] = {}
    for path in paths:
        if place := parse_numbered(path):
            series.setdefault(place._replace(number=0), set()).add(place.number)
    for place, numbers in series.items():
        if place.total > MAX_FILES:
            continue
        first = 1 if place.total in numbers and 0 not in numbers else 0
        expected = range(first, first + place.total)
        yield from (place.sibling(number) for number in expected if number not in numbers)


def split_of(shard_name: str) -> str:
    """The split in a shard's name: `train-000.tar`, `train-00000-of-00002.tar` -> `train`.

    `all` for a bare number.
    """
    stem = os.path.basename(shard_name).removesuffix(".tar")
    if place := parse_numbered(stem + ".tar"):
        return place.stem or "all"
    return re.sub(r"[-_.]?\d+$", "", stem) or "all"
