"""What `doctor` looks at, and what its rules give: a case and findings."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from wds_convnext.check.splits import repeated_values
from wds_convnext.check.survey import UNUSABLE, Survey
from wds_convnext.config import DoctorConfig
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.order import TrainOrder

_MAX_LISTED = 1_000  # images of a finding that JSON names
_MAX_ALIKE = 10
_COPY = np.dtype(
    [("image", np.uint64), ("split", np.int32), ("label", np.int32), ("number", np.int64)]
)


class Finding(NamedTuple):
    """What was found, why it matters, what to do: a sentence each.

    A note says what was measured, and no more. `samples` are those of each image that is meant.
    """

    found: str
    why: str = ""
    advice: str = ""
    samples: tuple[tuple[dict[str, Any], ...], ...] = ()

    @property
    def is_note(self) -> bool:
        return not self.advice


@dataclass(frozen=True, eq=False)
class Split:
    """A split, and what its samples look like."""

    dataset: Dataset
    survey: Survey

    @property
    def name(self) -> str:
        return self.dataset.split

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Samples per class, int64 (num_classes,)."""
        return self.survey.class_counts(self.dataset.num_classes)


@dataclass(frozen=True, eq=False)
class Case:
    """What the rules look at: a training as it would be started. The training split comes first."""

    config: DoctorConfig
    order: TrainOrder
    splits: tuple[Split, ...]
    quiet: bool = True

    @property
    def train(self) -> Split:
        return self.splits[0]

    @property
    def num_samples(self) -> int:
        return sum(len(split.dataset) for split in self.splits)

    def count(self, kind: str, value: str) -> int:
        """Images of all splits with a mode, or with something unusual."""
        return sum(getattr(split.survey.images, kind)[value] for split in self.splits)

    @cached_property
    def copies(self) -> np.ndarray:
        """The samples, _COPY, whose image is that of another, in any split; sorted."""
        repeated = repeated_values([split.survey.digests for split in self.splits])
        repeated = repeated[repeated != UNUSABLE]
        found = [np.zeros(0, _COPY)]
        for place, split in enumerate(self.splits if len(repeated) else ()):
            at = np.searchsorted(repeated, split.survey.digests)
            np.minimum(at, len(repeated) - 1, out=at)
            numbers = np.flatnonzero(repeated[at] == split.survey.digests)
            part = np.zeros(len(numbers), _COPY)
            part["image"], part["split"] = split.survey.digests[numbers], place
            part["label"], part["number"] = split.survey.labels[numbers], numbers
            found.append(part)
        copies = np.concatenate(found)
        return copies[np.lexsort([copies[name] for name in reversed(_COPY.names or ())])]

    def samples_of(self, images: np.ndarray) -> tuple[tuple[dict[str, Any], ...], ...]:
        """Split, shard, key and class of the samples of each of some images (the first thousand).

        Of those that share image, split and label, the first ten.

        Args:
            images: digests, of `copies`.
        """
        some = self.copies[np.isin(self.copies["image"], images[:_MAX_LISTED])]
        _, starts, sizes = np.unique(
            some[["image", "split", "label"]], return_index=True, return_counts=True
        )
        some = some[np.arange(len(some)) - np.repeat(starts, sizes) < _MAX_ALIKE]
        found: dict[int, list[dict[str, Any]]] = {}
        with ExitStack() as stack:
            readers = [
                stack.enter_context(closing(SampleReader(split.dataset))) for split in self.splits
            ]
            for image, place, label, number in some.tolist():
                where = readers[place].describe(number)
                about = {"split": self.splits[place].name, "shard": where["shard"]}
                name = self.splits[place].dataset.class_names[label]
                found.setdefault(image, []).append(about | {"key": where["key"], "class": name})
        return tuple(map(tuple, found.values()))


Rule = Callable[[Case], Iterator[Finding]]
