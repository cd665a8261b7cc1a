"""Whether the classes of two splits are the same, and the first difference if they are not."""

from dataclasses import replace
from typing import TYPE_CHECKING

from wds_convnext.errors import ShardError

if TYPE_CHECKING:
    from wds_convnext.shards.dataset import Dataset


def with_classes(dataset: "Dataset", class_names: tuple[str, ...], *, of: str) -> "Dataset":
    """A data set with the class names of another, whose classes it has.

    Where its own were only counted, it need not have a sample of each.

    Args:
        of: what has these names, for the message.
    Raises:
        ShardError: if its classes are others.
    """
    where, found = dataset.shards[0].where, dataset.class_names
    if dataset.is_counted and len(found) > len(class_names):
        raise ShardError(
            f"{where}: its split has labels up to {len(found) - 1}, but {of} has "
            f"{len(class_names)} classes. Use splits of one data set."
        )
    if not dataset.is_counted and (difference := class_difference(found, class_names)):
        raise ShardError(
            f"{where}: its {len(found)} classes are not the {len(class_names)} of {of}: "
            f"{difference}. Use splits of one data set."
        )
    return replace(dataset, class_names=class_names)


def class_difference(names: tuple[str, ...], others: tuple[str, ...]) -> str | None:
    """The first difference of two lists of class names, in words; None if there is none."""
    for number, (name, other) in enumerate(zip(names, others)):
        if name != other:
            return f"class {number} is {name!r} here and {other!r} there"
    if len(names) == len(others):
        return None
    return f"{len(names)} classes here and {len(others)} there"
