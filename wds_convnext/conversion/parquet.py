"""Image data sets in parquet files, as they exist in the world: their splits, files and columns.

The layout is Hugging Face's: files `{split}-{i:05d}-of-{n:05d}.parquet`, an image column that is
binary or a struct with `bytes`, a label column of integers or strings, and class names in the
schema's `huggingface` metadata. Where names differ, types decide.
"""

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from wds_convnext.errors import DataError, UsageError, did_you_mean

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes")
_LABEL_NAMES = ("label", "labels", "class", "target", "cls", "fine_label", "category", "y")


@dataclass(frozen=True)
class Columns:
    """Where image and label stand in a row. `class_names` is None if the metadata has none."""

    image: str
    image_is_struct: bool
    label: str
    class_names: tuple[str, ...] | None

    @property
    def leaves(self) -> list[str]:
        """The parquet columns to read."""
        return [self.image + ".bytes" if self.image_is_struct else self.image, self.label]


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file: rows and encoded image bytes of each of its row groups."""

    path: str
    columns: Columns
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    footer_sha256: str

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True)
class ParquetSplit:
    """The files of one split, in order; rows are numbered through all of them."""

    name: str
    parts: tuple[ParquetPart, ...]

    @cached_property
    def part_starts(self) -> list[int]:
        """The row at which each part starts, and after the last one the number of rows."""
        return [0, *accumulate(part.num_rows for part in self.parts)]

    @cached_property
    def group_starts(self) -> list[int]:
        """The row at which each row group starts, and after the last one the number of rows."""
        return [0, *accumulate(rows for part in self.parts for rows in part.group_rows)]

    @property
    def num_rows(self) -> int:
        return self.part_starts[-1]

    @cached_property
    def num_bytes(self) -> int:
        """The image bytes, as the footers state them."""
        return sum(sum(part.group_bytes) for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """Identifies the input: the names and footers (statistics, offsets) of its files."""
        facts = [(os.path.basename(part.path), part.footer_sha256) for part in self.parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def locate(self, row: int) -> tuple[str, int]:
        """The file that holds a row, and the row's number in it."""
        part = bisect_right(self.part_starts, row) - 1
        return self.parts[part].path, row - self.part_starts[part]


def find_splits(source: str) -> dict[str, list[str]]:
    """The parquet files of each split that a source names, in order.

    Args:
        source: a folder (its `data/` or any folder below is searched too), a glob, one file,
            or a comma list of these.
    Raises:
        UsageError: if nothing matches, or a file of a numbered series is missing.
    """
    paths = [path for part in filter(None, source.split(",")) for path in _expand(part.strip())]
    if not paths:
        raise UsageError(
            f"{source}: no parquet files. Run make data to download timm/mini-imagenet, "
            "or make demo for a small data set that needs no download."
        )
    splits: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        splits.setdefault(split_of(path), []).append(path)
    for files in splits.values():
        files.sort(key=_natural)
        _check_series(files)
    return splits


def _expand(part: str) -> list[str]:
    if os.path.isdir(part):
        for pattern in ("*.parquet", "data/*.parquet", "**/*.parquet"):
            if found := sorted(glob.glob(os.path.join(glob.escape(part), pattern), recursive=True)):
                return found
        return []
    if os.path.isfile(part):
        return [part]
    return sorted(glob.glob(part, recursive=True))


def split_of(path: str) -> str:
    """The split that a file's name states: `train-00000-of-00013.parquet` -> `train`.

    Without a name (`0000.parquet`) the folder's name counts.
    """
    stem = Path(path).stem
    stem = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", stem)
    stem = re.sub(r"(^|[-_.])\d+$", "", stem)
    return re.sub(r"[^\w-]", "_", stem or Path(path).absolute().parent.name)


def _natural(path: str) -> list:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path)]


def _check_series(files: list[str]) -> None:
    series: dict[tuple[str, str], set[int]] = {}
    for path in files:
        if match := re.search(r"^(.*)-(\d+)-of-(\d+)", path):
            series.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, total), numbers in series.items():
        if missing := sorted(set(range(int(total))) - numbers):
            raise UsageError(
                f"{stem}-*-of-{total}.parquet: {len(missing)} of {int(total)} files are missing, "
                f"the first is number {missing[0]:0{len(total)}d}. Run make data again."
            )


def open_split(
    name: str, paths: list[str], *, image: str | None = None, label: str | None = None
) -> ParquetSplit:
    """Read the footers of a split's files, and find their image and label columns.

    Raises:
        DataError: if a file is not parquet, is cut short, or differs from the others.
        UsageError: if the columns cannot be told.
    """
    parts = tuple(_open_part(path, image, label) for path in paths)
    for part in parts:
        if part.columns != parts[0].columns:
            raise DataError(
                f"{part.path}: its columns or class names differ from those of {parts[0].path}. "
                "Convert them into separate folders."
            )
    return ParquetSplit(name, parts)


def _open_part(path: str, image: str | None, label: str | None) -> ParquetPart:
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            footer_bytes = int.from_bytes(file.read(4), "little")
            file.seek(-8 - footer_bytes, os.SEEK_END)
            footer = hashlib.sha256(file.read()).hexdigest()
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    columns = find_columns(path, schema, image=image, label=label)
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaf = leaves.index(columns.leaves[0])
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return ParquetPart(
        path,
        columns,
        tuple(group.num_rows for group in groups),
        tuple(group.column(leaf).total_uncompressed_size for group in groups),
        footer,
    )


def unreadable(path: str, error: Exception) -> DataError:
    """The error to raise for a parquet file that cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: not readable as parquet ({reason}). Download it again (make data).")


def find_columns(
    path: str, schema: pa.Schema, *, image: str | None = None, label: str | None = None
) -> Columns:
    """Which columns of a file hold the image and the label: as named, or found by type.

    Raises:
        UsageError: if a named column is missing or of another type, or none or several fit.
    """
    features = _features(schema)
    images = [f.name for f in schema if _holds_images(f.type)]
    labels = [f.name for f in schema if _holds_labels(f.type)]
    image = _choose(path, schema, "image", image, images, features, "Image", _IMAGE_NAMES)
    label = _choose(path, schema, "label", label, labels, features, "ClassLabel", _LABEL_NAMES)
    names = features.get(label, {}).get("names")
    return Columns(
        image,
        pa.types.is_struct(schema.field(image).type),
        label,
        tuple(map(str, names)) if names else None,
    )


def _features(schema: pa.Schema) -> dict:
    try:
        stated = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in stated.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text


def _choose(path, schema, role, named, fitting, features, feature_type, usual_names) -> str:
    """One column for a role: the one named, stated by the metadata, usually named so, or only."""
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if named is not None:
        if named in fitting:
            return named
        found = "is not of a type for it" if named in schema.names else "is not there"
        hint = did_you_mean(named, fitting)
        raise UsageError(f"{path}: --{role}-column {named} {found}; columns: {columns}.{hint}")
    stated = [c for c in fitting if features.get(c, {}).get("_type") == feature_type]
    usual = [c for name in usual_names for c in fitting if c.lower() == name]
    for candidates in (stated, usual[:1], fitting):
        if len(candidates) == 1:
            return candidates[0]
    problem = f"several {role} columns fit" if fitting else f"no {role} column"
    raise UsageError(f"{path}: {problem}; columns: {columns}. Name one with --{role}-column.")
