"""The splits of a source that can be converted, and the class names that they share."""

import pyarrow as pa
import pyarrow.compute as pc

from wds_convnext.conversion.columns import NoLabelColumn
from wds_convnext.conversion.parquet import ParquetSplit, open_split
from wds_convnext.conversion.rows import read_labels
from wds_convnext.conversion.sources import find_splits
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.classes import class_difference
from wds_convnext.shards.naming import purpose

_MAX_CLASSES = 1_000_000
_FEW_CLASSES = 8  # of so few, each may well have one row


def open_splits(
    source: str, *, image: str | None = None, label: str | None = None
) -> tuple[list[ParquetSplit], dict[str, str]]:
    """The splits of a source, and by name why others are left out: no rows, or no labels.

    Raises:
        UsageError: as `find_splits` and `find_columns`; also if the training split has no labels.
        DataError: if a file is damaged, or no split has a labelled row.
    """
    splits, left_out, first_refusal = [], {}, None
    for name, paths in find_splits(source).items():
        try:
            split = open_split(name, paths, image=image, label=label)
        except NoLabelColumn as error:
            if purpose(name) == "train":
                raise
            first_refusal = first_refusal or error
            left_out[name] = f"it has no label column{f' {label}' if label else ''}"
            continue
        if split.num_rows == 0:
            left_out[name] = "it has no rows"
        elif _is_labelled(split):
            splits.append(split)
        else:
            column = split.parts[0].columns.label
            left_out[name] = (
                f"none of its {split.num_rows:,} rows has a label (column {column}: null or -1)"
            )
            if purpose(name) == "train":
                raise DataError(f"{paths[0]}: the split {name} cannot be used: {left_out[name]}.")
    if not splits and first_refusal:
        raise first_refusal
    if not splits:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"{source}: nothing to convert. {reasons}.")
    return splits, left_out


def _is_labelled(split: ParquetSplit) -> bool:
    """Whether any row has a label; in most splits the first batch shows it."""
    for labels in read_labels(split, 0, split.num_rows):
        known = labels.drop_null()
        if len(known) and not (pa.types.is_integer(known.type) and pc.max(known).as_py() < 0):
            return True
    return False


def find_class_names(
    splits: list[ParquetSplit], *, is_label_named: bool = False
) -> tuple[str, ...]:
    """The class names that the splits share: as their metadata states, else from the labels.

    Labels without names are `0 … highest` if integers, and their sorted values if strings.

    Args:
        is_label_named: whether the user named the label column. If not, one with about as many
            values as rows is taken for an identifier or a caption.
    Raises:
        DataError: if the splits' names differ, or labels cannot be class numbers.
        UsageError: if the label column may be no label.
    """
    parts = [part for split in splits for part in split.parts]
    for part in parts:
        names, others = parts[0].columns.class_names or (), part.columns.class_names or ()
        if difference := class_difference(names, others):
            raise DataError(
                f"{parts[0].path} and {part.path}: their class names differ: {difference}. "
                "Convert them into separate folders."
            )
    if parts[0].columns.class_names:
        return parts[0].columns.class_names
    column = f"{parts[0].path}, column {parts[0].columns.label}"
    values = set()
    for split in splits:
        for labels in read_labels(split, 0, split.num_rows):
            values.update(pc.unique(labels).to_pylist())
    values.discard(None)
    if len({isinstance(value, str) for value in values}) > 1:
        raise DataError("labels are integers in some splits and strings in others. Name one kind.")
    num_rows = sum(split.num_rows for split in splits)
    if not is_label_named and len(values) >= max(_FEW_CLASSES, 0.8 * num_rows):
        raise UsageError(
            f"{column}: {len(values):,} different labels in {num_rows:,} rows, so it may hold "
            "identifiers or captions. If these are the classes, name it with --label-column."
        )
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    highest = int(max(values))
    if highest >= _MAX_CLASSES:
        raise DataError(
            f"{column}: a label of {highest:,}; expected class numbers from 0. Name another "
            "column with --label-column."
        )
    return tuple(str(label) for label in range(highest + 1))
