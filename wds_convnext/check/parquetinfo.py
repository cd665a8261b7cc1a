"""What parquet files are made of, from their footers: schema, rows, row groups, compression."""

import os
from collections import Counter
from dataclasses import dataclass

import pyarrow.parquet as pq

from wds_convnext.conversion.sources.columns import find_columns
from wds_convnext.conversion.sources.parquet_part import UNREADABLE, unreadable
from wds_convnext.errors import UsageError, printable


@dataclass(frozen=True)
class LeafColumn:
    """A parquet column; sizes are sums over all row groups."""

    name: str
    physical_type: str
    compression: str
    num_bytes: int
    uncompressed_bytes: int


@dataclass(frozen=True)
class ParquetSummary:
    """The parquet files of one split. `columns` are those of the first file's schema."""

    split: str
    paths: tuple[str, ...]
    num_rows: int
    num_bytes: int
    group_rows: tuple[int, ...]
    schema: tuple[tuple[str, str], ...]  # name and type
    leaves: tuple[LeafColumn, ...]
    image_and_label: tuple[str, str] | None  # the columns that a conversion would take
    class_names: tuple[str, ...] | None
    created_by: tuple[str, ...]

    def lines(self) -> list[str]:
        """The summary as text."""
        files = f"{len(self.paths)} file{'s' * (len(self.paths) != 1)}"
        head = f"{self.split}: {self.num_rows:,} rows, {files}, {self.num_bytes / 1e6:,.1f} MB"
        groups = self.group_rows or (0,)
        lines = [
            f"row groups: {len(self.group_rows):,} of {min(groups):,} to {max(groups):,} rows",
            f"written by: {', '.join(self.created_by)}",
            *(f"column {name}: {kind}" for name, kind in self.schema),
        ]
        for leaf in self.leaves:
            saved = 1 - leaf.num_bytes / max(1, leaf.uncompressed_bytes)
            lines.append(
                f"stored {leaf.name}: {leaf.physical_type}, {leaf.compression}, "
                f"{leaf.num_bytes / 1e6:,.1f} MB ({saved:.0%} saved)"
            )
        if self.image_and_label:
            lines.append("images in {}, labels in {}".format(*self.image_and_label))
        else:
            lines.append(
                "images and labels: not clear; name them with --image-column, --label-column"
            )
        if self.class_names:
            names = ", ".join(self.class_names[:5]) + ", …" * (len(self.class_names) > 5)
            lines.append(f"{len(self.class_names)} classes: {names}")
        return [printable(line, limit=2000) for line in (head, *(f"  {line}" for line in lines))]

    def to_json(self) -> dict:
        return vars(self) | {
            "kind": "parquet",
            "schema": dict(self.schema),
            "leaves": [vars(leaf) for leaf in self.leaves],
        }


def summarise_parquet(split: str, paths: list[str]) -> ParquetSummary:
    """Read the footers of a split's files.

    Raises:
        DataError: if a file is not parquet, or is cut short.
    """
    schema, group_rows, created_by = None, [], Counter[str]()
    leaves: dict[tuple[str, str, str], tuple[int, int]] = {}
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                metadata, schema = file.metadata, schema or file.schema_arrow
            names_and_types = tuple((column.name, str(column.type)) for column in schema)
            created_by[metadata.created_by or "unknown"] += 1
            for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
                group_rows.append(group.num_rows)
                for column in (group.column(i) for i in range(group.num_columns)):
                    kind = column.path_in_schema, column.physical_type, column.compression
                    sizes = column.total_compressed_size, column.total_uncompressed_size
                    before = leaves.get(kind, (0, 0))
                    leaves[kind] = (before[0] + sizes[0], before[1] + sizes[1])
        except UNREADABLE as error:
            raise unreadable(path, error) from None
    try:
        columns = find_columns(paths[0], schema)
    except UsageError:
        columns = None
    return ParquetSummary(
        split=split,
        paths=tuple(paths),
        num_rows=sum(group_rows),
        num_bytes=sum(map(os.path.getsize, paths)),
        group_rows=tuple(group_rows),
        schema=names_and_types,
        leaves=tuple(LeafColumn(*kind, *sizes) for kind, sizes in leaves.items()),
        image_and_label=(columns.image, columns.label) if columns else None,
        class_names=columns.class_names if columns else None,
        created_by=tuple(created_by),
    )
