"""What a conversion wrote and found, as text."""

import re
from collections import Counter
from dataclasses import dataclass, field

from wds_convnext.conversion.shrink import Shrunk
from wds_convnext.errors import printable
from wds_convnext.shards.image import ImageSurvey
from wds_convnext.shards.spec import Shard, total_bytes


@dataclass(frozen=True)
class SplitReport:
    """What was written for one split and what was found in it."""

    split: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    columns: tuple[str, str]  # of images, of labels
    survey: ImageSurvey = field(default_factory=ImageSurvey)
    skipped: Counter = field(default_factory=Counter)
    notes: tuple[str, ...] = ()  # on the input
    shrunk: Shrunk = Shrunk()
    already_complete: bool = False

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return total_bytes(self.shards)

    def lines(self) -> list[str]:
        """The report as text."""
        found = [
            ("formats", self.survey.formats),
            ("modes", self.survey.modes),
            ("unusual", self.survey.unusual),
            ("skipped", self.skipped),
        ]
        state = "already complete: " if self.already_complete else ""
        head = (
            f"{self.split}: {state}{self.num_samples:,} samples, {len(self.class_names)} classes, "
            f"{len(self.shards)} shard{'s' * (len(self.shards) != 1)}, "
            f"{self.num_bytes / 1e6:,.1f} MB"
        )
        columns = "  columns: images from {}, labels from {}".format(*self.columns)
        lines = [columns] + [f"  {name}: {_counts(counter)}" for name, counter in found if counter]
        if self.survey.formats:
            lines.insert(3, f"  sizes: {self.survey.describe_sizes()}")
        lines += [f"  {note}" for note in self.notes]
        if self.shrunk.num_images:
            lines.append(f"  shrunk: {self.shrunk}")
        return [printable(line, limit=2000) for line in (head, *lines)]


def _counts(counter: Counter) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counter.most_common())


def kind_of(reason: str) -> str:
    return re.split(r"[(:]", reason)[0].strip()
