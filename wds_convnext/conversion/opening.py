"""Of what kind a source is, its splits that can be converted, and the class names they share."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wds_convnext.conversion.source import Count, NoLabels, Opener, SourceSplit, as_array
from wds_convnext.conversion.sources import archive, arrow, folder, hub, parquet, table, webdataset
from wds_convnext.door import read_head
from wds_convnext.errors import DataError, UsageError, listing
from wds_convnext.shards.classes import class_difference
from wds_convnext.shards.naming import purpose
from wds_convnext.shards.sniff import sniff


@dataclass(frozen=True)
class Kind:
    """A kind of source: `find` gives the splits of one, or None for a source of another kind.

    Args:
        may_die: whether its openers run native code that some damaged files make end the process.
    """

    find: Callable[[str, Count], dict[str, Opener] | None]
    may_die: bool = False


KINDS = (
    Kind(arrow.find, may_die=True),
    Kind(parquet.find, may_die=True),
    Kind(folder.find),
    Kind(webdataset.find),
    Kind(table.find),
    Kind(archive.find),
)
ACCEPTED = (
    "parquet files of images and labels, a folder, zip or tar of class folders, a CSV, TSV or JSON "
    "lines file of paths and labels, shards, or a data set of Hugging Face"
)

Source = str | SourceSplit | Iterable[SourceSplit]

_MAX_CLASSES = 1_000_000
_FEW_CLASSES = 8  # of so few, each may well have one row


@dataclass(frozen=True)
class Found:
    """The splits of a source by name, and whether opening them may end the process."""

    openers: dict[str, Opener]
    may_die: bool


def find_openers(source: Source, count: Count) -> Found:
    """The splits of a source, of whatever kind it is; no image or label of them is read yet.

    Args:
        count: called with the files that have been listed.
    Raises:
        UsageError: if the source is of no kind that is read.
    """
    if isinstance(source, SourceSplit):
        source = [source]
    if not isinstance(source, str):
        return Found({split.name: _opener_of(split) for split in source}, may_die=False)
    hub_folder = hub.find_folder(source)
    path = hub_folder.path if hub_folder else source
    for kind in KINDS:
        if openers := kind.find(path, count):
            if hub_folder:  # its folder is called by the revision
                rename = partial(_open_renamed, dataset=hub_folder.dataset)
                openers = {name: partial(rename, opener) for name, opener in openers.items()}
            return Found(openers, kind.may_die)
    raise UsageError(f"{source}: {_found(path)}. Expected {ACCEPTED}.")


def _open_renamed(opener: Opener, *, dataset: str, **columns: str | None) -> SourceSplit:
    return replace(opener(**columns), dataset=dataset)


def _opener_of(split: SourceSplit) -> Opener:
    def open_split(**_: Any) -> SourceSplit:
        return split

    return open_split


def _found(source: str) -> str:
    """What stands in place of a source, in words."""
    if os.path.isdir(source):
        files = [name for _, _, names in os.walk(source) for name in names]
        kinds = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in files)
        held = listing((f"{kind} {num:,}" for kind, num in kinds.most_common()), limit=5)
        return f"a folder of {len(files):,} files ({held})" if files else "an empty folder"
    if os.path.isfile(source):
        known = sniff(read_head(source, 64))
        return f"{known[0]}" if known else "a file of a kind that is not read"
    return "there is no such file or folder"


def open_splits(
    openers: dict[str, Opener], *, image: str | None = None, label: str | None = None
) -> tuple[list[SourceSplit], dict[str, str]]:
    """The splits of a source, and by name why others are left out: no rows, or no labels.

    Raises:
        UsageError: as `find_columns`; also if the training split has no labels.
        DataError: if a file is damaged, or no split has a labelled row.
    """
    splits, left_out, first_refusal = [], {}, None
    for name, open_split in openers.items():
        try:
            split = open_split(image=image, label=label)
        except NoLabels as error:
            if purpose(name) == "train":
                raise
            first_refusal = first_refusal or error
            left_out[name] = error.reason
            continue
        if split.num_rows == 0:
            left_out[name] = "it has no rows"
        elif _is_labelled(split):
            splits.append(split)
        else:
            left_out[name] = (
                f"none of its {split.num_rows:,} rows has a label "
                f"(column {split.columns[1]}: null or -1)"
            )
            if purpose(name) == "train":
                raise DataError(
                    f"{split.where}: the split {name} cannot be used: {left_out[name]}."
                )
    if not splits and first_refusal:
        raise first_refusal
    if not splits:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"nothing to convert: {reasons}.")
    return splits, left_out


def _is_labelled(split: SourceSplit) -> bool:
    """Whether any row has a label; in most splits the first batch shows it."""
    for labels in split.labels(0, split.num_rows):
        known = as_array(labels).drop_null()
        if len(known) and not (pa.types.is_integer(known.type) and pc.max(known).as_py() < 0):
            return True
    return False


def find_class_names(splits: list[SourceSplit], *, is_label_named: bool = False) -> tuple[str, ...]:
    """The class names that the splits share: as their metadata states, else from the labels.

    Labels without names are `0 … highest` if integers, and their sorted values if strings.

    Args:
        is_label_named: whether the user named the label column. If not, one with about as many
            values as rows is taken for an identifier or a caption.
    Raises:
        DataError: if the splits' names differ, or labels cannot be class numbers.
        UsageError: if the label column may be no label.
    """
    first = splits[0]
    for split in splits:
        names, others = first.class_names or (), split.class_names or ()
        if difference := class_difference(names, others):
            raise DataError(
                f"{first.where} and {split.where}: their class names differ: {difference}. "
                "Convert them into separate folders."
            )
    if first.class_names:
        return first.class_names
    column = f"{first.where}, column {first.columns[1]}"
    values = set()
    for split in splits:
        for labels in split.labels(0, split.num_rows):
            values.update(pc.unique(as_array(labels)).to_pylist())
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
