"""The splits of a training: its shards, and those that it is validated on."""

from wds_convnext.errors import ShardError
from wds_convnext.shards.classes import with_classes
from wds_convnext.shards.dataset import Dataset, open_dataset
from wds_convnext.shards.expand import find_counterpart


def open_splits(
    shards: str, val_shards: str | None, *, jobs: int, quiet: bool
) -> tuple[Dataset, Dataset | None, str | None]:
    """The training split, the validation split if there is one, and what names the latter.

    Both have the class names of the one whose manifest states them.

    Args:
        shards: a spec, see `expand.expand_spec`.
        val_shards: likewise; None for those next to the training shards.
        jobs, quiet: see `open_dataset`.
    Raises:
        ShardError: if the splits cannot be opened, or their classes differ or are fewer than two.
    """
    train_data = open_dataset(shards, jobs=jobs, quiet=quiet)
    spec = val_shards or find_counterpart(train_data.shards[0].path, use="validation")
    val_data = None
    if spec:
        val_data = open_dataset(spec, use="validation", jobs=jobs, quiet=quiet)
        classes = _shared_classes(train_data, val_data)
        train_data = with_classes(train_data, classes, of=spec)
        val_data = with_classes(val_data, classes, of=shards)
    if train_data.num_classes < 2:
        raise ShardError(
            f"{shards}: all {len(train_data):,} samples are of one class, so there is "
            "nothing to learn. Look at their labels: wds-convnext inspect."
        )
    return train_data, val_data, spec


def _shared_classes(train_data: Dataset, val_data: Dataset) -> tuple[str, ...]:
    """The class names of both splits: stated by a manifest, else as many as either has labels."""
    if not train_data.is_counted:
        return train_data.class_names
    if not val_data.is_counted:
        return val_data.class_names
    return max(train_data.class_names, val_data.class_names, key=len)
