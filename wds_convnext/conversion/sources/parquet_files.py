"""The parquet files that a source names, by split: one folder and one series for each.

Names are Hugging Face's, `{split}-{i:05d}-of-{n:05d}.parquet`, or those of pandas, polars, Spark,
the hub's converted branches (`default/train/0000.parquet`).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from wds_convnext.door import read_head
from wds_convnext.errors import UsageError, listing
from wds_convnext.shards.naming import find_files, missing_siblings, parse_numbered

_COMPRESSION = r"\.(snappy|gz|gzip|zstd|zst|lz4|lzo|lz4_raw|br|brotli|uncompressed)$"


def find_splits(source: str) -> dict[str, list[str]]:
    """The parquet files of each split that a source names, in order.

    Args:
        source: a folder (all folders below are searched, too), a glob, one file, or a comma list
            of these.
    Raises:
        UsageError: if a part matches nothing, a split's files are of more than one folder or
            series, or a file of a numbered series is missing.
    """
    parts = [source] if os.path.exists(source) else source.split(",")
    paths = [path for part in map(str.strip, parts) if part for path in _expand(part)]
    if not paths:
        raise UsageError(f"{source!r}: names no parquet files. Name a folder that holds some.")
    splits: dict[str, list[str]] = {}
    for path in dict.fromkeys(map(os.path.normpath, paths)):
        splits.setdefault(split_of(path), []).append(path)
    for split, files in splits.items():
        files.sort(key=_natural)
        _check_series(split, files)
    return splits


def names_parquet(source: str) -> bool:
    """Whether a source, or a part of a comma list, names parquet files."""
    parts = [source] if os.path.exists(source) else source.split(",")
    for part in map(str.strip, parts):
        if os.path.isfile(part) and read_head(part, 4) == b"PAR1":
            return True
        if next(_parquet_files(part), None):
            return True
    return False


def _parquet_files(part: str) -> Iterator[str]:
    """The parquet files in a folder, or those that a name or a glob means."""
    paths = _walk(part) if os.path.isdir(part) else find_files(part)
    return (p for p in paths if p.endswith(".parquet") and _is_open(os.path.basename(p)))


def _expand(part: str) -> list[str]:
    if os.path.isfile(part):
        return [part]
    found = list(_parquet_files(part))
    if not found:
        raise UsageError(f"{part}: no parquet files. Name a folder that holds some, or the files.")
    return sorted(found)


def _walk(folder: str) -> Iterator[str]:
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = filter(_is_open, folders)
        yield from (os.path.join(path, name) for name in names)


def _is_open(name: str) -> bool:
    """Whether a file or folder is meant to be seen; Spark and Delta hide theirs behind `_`."""
    return not name.startswith((".", "_"))


def split_of(path: str) -> str:
    """The split that a file's name states: `train-00000-of-00013.parquet` -> `train`.

    Without a name (`0000.parquet`, Spark's `part-00000-….parquet`) the folder's name counts.
    """
    stem = _series_of(path)[1]
    if not stem:
        folder = Path(path).absolute().parent.name
        stem = folder.removesuffix(".parquet").removeprefix("split=")
    return re.sub(r"[^\w-]", "_", stem)


def _series_of(path: str) -> tuple[str, str, str, int | None]:
    """The series that a file belongs to (folder, stem, kind), and its number in it."""
    folder, name = os.path.split(path)
    if place := parse_numbered(path):
        return folder, place.stem, f"{place.joint}*-of-{place.total_digits}", place.number
    stem = re.sub(_COMPRESSION, "", name.removesuffix(".parquet"))
    if match := re.match(r"part[-_.]?(\d+)(?=$|[-_.])", stem):
        return folder, "", "part", int(match[1])
    if match := re.search(r"(^|[-_.])(\d+)$", stem):
        return folder, stem[: match.start()], match[1], int(match[2])
    return folder, stem, "", None


def _natural(path: str) -> list:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path)]


def _check_series(split: str, files: list[str]) -> None:
    """Refuse files that are not one whole series: another revision, configuration or size."""
    series: dict[tuple, list[str]] = {}
    seen: dict[tuple, str] = {}
    for path in files:
        place = _series_of(path)
        series.setdefault(place[:3], []).append(path)
        if (other := seen.setdefault(place, path)) != path:
            raise UsageError(
                f"{other} and {path}: both are number {place[3]} of {split}. Two versions of a "
                "data set must not be added together: move one away."
            )
    if len(series) > 1:
        listed = [f"{paths[0]} ({len(paths)} of them)" for paths in series.values()]
        raise UsageError(
            f"{split}: {len(listed)} series of files have this split's name: "
            f"{listing(listed, limit=5)}. They are not added together: name one of them, by its "
            "folder or a glob."
        )
    numbered = parse_numbered(files[0])
    if numbered and (missing := next(missing_siblings(files), None)):
        total = numbered.total
        raise UsageError(
            f"{split}: {total - len(files)} of {total} files are missing, the first is {missing}. "
            "Download them, too."
        )
