"""A conversion by parts: processes on several machines, each with its share of every pass.

All see the staging folder, and know of each other by the records in it alone. Where a pass needs
what all have left of the one before, a part waits for the others' records. When none comes any
more, since a machine was lost or its job has not begun, it does the missing steps itself: a step
that two do at once is twice the same file.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from wds_convnext.conversion.passes import Task, record_path
from wds_convnext.conversion.records import read_record
from wds_convnext.errors import WdsConvnextError, listing
from wds_convnext.progress import Progress

PATIENCE_S = 120.0  # a step takes less: 256 MB are read, or a shard is written
_POLL_S = 0.5

Run = Callable[[Sequence[Task]], object]


@dataclass(frozen=True)
class Part:
    """One of `of` parts of every pass; `number` counts from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """A part as options state it, as 3/16."""
        number, of = text.split("/")
        return cls(int(number), int(of))

    def share(self, tasks: Sequence[Task]) -> Sequence[Task]:
        return tasks[self.number - 1 :: self.of]


@dataclass(frozen=True)
class PartReport:
    """Says that a part of a split is done."""

    split: str
    part: str

    def lines(self) -> list[str]:
        return [f"{self.split}: part {self.part} is done"]


def await_records(
    part: Part, tasks: Sequence[Task], run: Run, *, at_once: int, progress: Progress
) -> list[dict]:
    """The records of all tasks of a pass, when the others have done theirs.

    Args:
        part: has done its share.
        run: does some tasks, `at_once` together.
        progress: counts tasks.
    """
    paths = [record_path(task) for task in tasks]
    records: dict[int, dict] = {}
    helped: set[int] = set()
    patient_until = time.monotonic() + PATIENCE_S
    while True:
        there = set(os.listdir(os.path.dirname(paths[0])))
        missing = [number for number in range(len(tasks)) if number not in records]
        for number in missing:
            if os.path.basename(paths[number]) in there and (record := read_record(paths[number])):
                records[number] = record
                if number not in helped:
                    patient_until = time.monotonic() + PATIENCE_S
        progress.show(len(records))
        missing = [number for number in missing if number not in records]
        if not missing:
            return [records[number] for number in range(len(tasks))]
        if time.monotonic() < patient_until:
            time.sleep(_POLL_S)
            continue
        # From another place on in each part, so that they seldom do the same.
        first = (part.number - 1) * len(missing) // part.of
        helped.update(chosen := (missing[first:] + missing[:first])[:at_once])
        run([tasks[number] for number in chosen])


def finished_records(tasks: Sequence[Task], *, title: str) -> list[dict]:
    """The records of all tasks of a pass.

    Raises:
        WdsConvnextError: if some are not done, with their numbers.
    """
    records = [read_record(record_path(task)) for task in tasks]
    missing = [str(number) for number, record in enumerate(records, 1) if record is None]
    if missing:
        raise WdsConvnextError(
            f"{title}: {len(missing):,} of {len(tasks):,} steps are not done: "
            f"{listing(missing, limit=100)}. Step n is that of --part n/N, or n minus a multiple "
            "of N: run these parts again, or the same command without --finish, which does them."
        )
    return [record for record in records if record is not None]
