"""What is in shards, sample by sample: labels, sizes, digests, and what the images' headers say."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from wds_convnext.errors import DataError
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.image import ImageSurvey, inspect_image
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.sidecar import read_samples
from wds_convnext.shards.spec import Shard, check_size
from wds_convnext.storage.layout import held

UNUSABLE = 0  # in place of a digest


@dataclass(frozen=True)
class Survey:
    """What was found in one or more shards: 16 bytes a sample, and counts."""

    shards: tuple[Shard, ...]
    labels: np.ndarray  # int32 (num_samples,)
    image_bytes: np.ndarray  # int32 (num_samples,), of the encoded images
    digests: np.ndarray  # uint64 (num_samples,), of the encoded images; or UNUSABLE
    images: ImageSurvey = field(default_factory=ImageSurvey)
    unusable: Counter[str] = field(default_factory=Counter)  # reasons

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Samples per class, int64 (num_classes,).

        Raises:
            DataError: if a label is beyond the classes.
        """
        counts = np.bincount(self.labels, minlength=num_classes)
        if len(counts) > num_classes:
            raise DataError(
                f"{self.shards[0].path}: a label of {len(counts) - 1}, but the manifest names "
                f"{num_classes} classes. wds-convnext verify finds the sample."
            )
        return counts


def survey_shards(
    shards: Sequence[Shard], label_field: str, *, title: str, workers: Workers, quiet: bool
) -> Survey:
    """Look at the header and the label of every sample; nothing is decoded.

    Args:
        shards: their number of samples may be -1: not known.
    Raises:
        ShardError: if a shard is missing or damaged.
        DataError: if a label is no class number.
    """
    num_images = sum(max(0, shard.num_samples) for shard in shards)
    progress = Progress(title, total=num_images, quiet=quiet)
    found = workers.run(survey_shard, [(shard, label_field) for shard in shards], progress=progress)
    images, unusable = ImageSurvey(), Counter[str]()
    for part in found:
        images.merge(part.images.to_json())
        unusable += part.unusable
    return Survey(
        tuple(part.shards[0] for part in found),
        np.concatenate([part.labels for part in found]),
        np.concatenate([part.image_bytes for part in found]),
        np.concatenate([part.digests for part in found]),
        images,
        unusable,
    )


def survey_shard(task: tuple[Shard, str], count: Callable[[int, int], None]) -> Survey:
    """What is in one shard (shard, label field)."""
    stated, label_field = task
    with held(stated.path):
        return _survey_shard(stated, label_field, count)


def _survey_shard(stated: Shard, label_field: str, count: Callable[[int, int], None]) -> Survey:
    check_size(stated)
    members = read_samples(stated.path)
    shard = Shard(stated.path, len(members), os.path.getsize(stated.path))
    labels, image_bytes = np.zeros((2, len(members)), np.int32)
    survey = Survey((shard,), labels, image_bytes, np.zeros(len(members), np.uint64))
    samples = scan_shard(shard.path, members, label_field=label_field, images=True)
    for number, sample in enumerate(samples):
        if sample.error is not None:
            raise sample.error
        labels[number], image_bytes[number] = sample.label, len(sample.image)
        try:
            survey.images.add(inspect_image(sample.image))
            survey.digests[number] = xxhash.xxh3_64_intdigest(sample.image)
        except DataError as error:
            survey.unusable[str(error)] += 1
        count(1, len(sample.image))
    return survey
