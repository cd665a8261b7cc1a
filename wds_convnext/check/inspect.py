"""What a data set holds: counts, classes, image sizes and formats, and how well it will be mixed.

Every image's header is read and its end looked for, at the speed of the disk; nothing is decoded.
"""

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wds_convnext.check.labelmix import LabelMix, measure_label_mix
from wds_convnext.check.parquetinfo import ParquetSummary, summarise_parquet
from wds_convnext.check.sheet import draw_sheet
from wds_convnext.check.splits import ShardSplit, find_shard_splits
from wds_convnext.check.survey import Survey, survey_shards
from wds_convnext.config import InspectConfig
from wds_convnext.conversion.sources.parquet_files import find_splits
from wds_convnext.errors import ShardError, UsageError, printable
from wds_convnext.pool import Workers
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.image import ImageSurvey
from wds_convnext.shards.naming import find_files, is_held_out
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.spec import Shard, total_bytes
from wds_convnext.storage.cache import caching

_MAX_CLASS_LINES = 20


@dataclass(frozen=True)
class ShardSummary:
    """What the shards of one split hold. `label_mix` is None for a split that is not trained on."""

    dataset: Dataset
    class_counts: np.ndarray  # int64 (num_classes,)
    image_bytes: np.ndarray  # int32 (num_samples,), of the encoded images
    survey: ImageSurvey
    unusable: Counter[str]
    label_mix: LabelMix | None

    @property
    def num_bytes(self) -> int:
        return total_bytes(self.dataset.shards)

    def lines(self) -> list[str]:
        """The summary as text."""
        shards, sizes = self.dataset, self.dataset.sizes
        head = (
            f"{shards.split}: {len(shards):,} samples, {shards.num_classes} classes, "
            f"{len(sizes)} shard{'s' * (len(sizes) != 1)}, {self.num_bytes / 1e6:,.1f} MB"
        )
        lines = [f"samples per shard: {_range_of(sizes)}", *self._image_lines()]
        lines += self._class_lines()
        if self.label_mix is not None:
            lines += self.label_mix.lines()
        return [printable(line, limit=2000) for line in (head, *(f"  {line}" for line in lines))]

    def _image_lines(self) -> list[str]:
        found = [
            ("formats", self.survey.formats),
            ("modes", self.survey.modes),
            ("unusual", self.survey.unusual),
            ("unusable", self.unusable),
        ]
        lines = [
            f"{name}: " + ", ".join(f"{value} {number:,}" for value, number in counts.most_common())
            for name, counts in found
            if counts
        ]
        if self.survey.formats:
            lines.append(f"pixels: {self.survey.describe_sizes()}")
        return [*lines, f"bytes per image: {_range_of(self.image_bytes)}"]

    def _class_lines(self) -> list[str]:
        counts = self.class_counts
        lines = [f"samples per class: {_range_of(counts)}"]
        shown = list(range(len(counts)))
        if len(shown) > _MAX_CLASS_LINES:
            shown = np.argsort(-counts, kind="stable").tolist()
            half = _MAX_CLASS_LINES // 2
            shown[half:-half] = []
            lines[0] += f"; the {half} largest and the {half} smallest:"
        names = {i: printable(self.dataset.class_names[i]) for i in shown}
        width = max(map(len, names.values()), default=0)
        longest = max(1, counts.max(initial=0))
        return lines + [
            f"  {names[i]:<{width}}  {counts[i]:>9,}  {'#' * round(30 * counts[i] / longest)}"
            for i in shown
        ]

    def to_json(self) -> dict:
        shards = self.dataset
        return {
            "kind": "shards",
            "dataset": shards.name,
            "split": shards.split,
            "num_samples": len(shards),
            "num_bytes": self.num_bytes,
            "shards": [
                {
                    "path": shard.where,
                    "num_samples": shard.num_samples,
                    "num_bytes": shard.num_bytes,
                }
                for shard in shards.shards
            ],
            "class_names": list(shards.class_names),
            "class_counts": self.class_counts.tolist(),
            "images": self.survey.to_json(),
            "bytes_per_image": _percentiles(self.image_bytes),
            "unusable": dict(self.unusable),
            "label_mix": self.label_mix and self.label_mix.to_json(),
        }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    names = {"smallest": 0, "median": 50, "p95": 95, "largest": 100}
    found = np.percentile(values, list(names.values())) if len(values) else np.zeros(4)
    return {name: round(value) for name, value in zip(names, found.tolist())}


def _range_of(values: np.ndarray) -> str:
    found = _percentiles(values)
    return f"{found['smallest']:,} to {found['largest']:,}, median {found['median']:,}"


def inspect(
    spec: str, config: InspectConfig | None = None, *, quiet: bool = False, **options: Any
) -> list[ShardSummary | ParquetSummary]:
    """Describe each split of shards, with or without a manifest, or of parquet files.

    Args:
        spec: shards as for training; a folder stands for all splits in it. Or parquet files: a
            folder of them, a glob, a file.
        config: what to show besides, and of which training the label mix is.
        options: fields of `InspectConfig` by name: `sheet="sheet.png", batch_size=64`.
            By default there is a process per CPU core, so that a script has to call this under
            `if __name__ == "__main__":`, or with `jobs=1`.
    Raises:
        ShardError: if the spec names nothing, or a shard is missing or damaged.
        DataError: if a label is no class number.
        UsageError: if a sheet of several splits, or of parquet files, is asked for.
    """
    config = InspectConfig.of(config, options)
    with caching(config):
        return _inspect(spec, config, quiet=quiet)


def _inspect(
    spec: str, config: InspectConfig, *, quiet: bool
) -> list[ShardSummary | ParquetSummary]:
    sheet = config.sheet
    if _names_parquet(spec):
        if sheet is not None:
            raise UsageError("--sheet is drawn from shards. Write shards first.")
        return [summarise_parquet(name, paths) for name, paths in find_splits(spec).items()]
    splits = find_shard_splits(spec)
    if sheet is not None and len(splits) > 1:
        names = ", ".join(split.name for split in splits)
        raise UsageError(f"--sheet shows one split, and there are {names}. Name one.")
    summaries: list[ShardSummary | ParquetSummary] = []
    with Workers(config.jobs) as workers:
        for split in splits:
            dataset, survey = _survey(split, workers, quiet)
            mix = None
            if len(dataset) and not is_held_out(split.name):
                mix = measure_label_mix(
                    survey.labels,
                    dataset.sizes,
                    batch_size=config.batch_size,
                    shuffle_buffer=config.shuffle_buffer,
                    seed=config.seed,
                    world_size=config.ranks,
                )
            counts = survey.class_counts(dataset.num_classes)
            summaries.append(
                ShardSummary(
                    dataset, counts, survey.image_bytes, survey.images, survey.unusable, mix
                )
            )
            if sheet is not None:
                is_all = split.manifest and split.is_whole
                draw_sheet(
                    open_dataset(split.manifest_path if is_all else ",".join(split.paths)), sheet
                )
    return summaries


def _names_parquet(spec: str) -> bool:
    if not os.path.isdir(spec):
        return spec.endswith(".parquet")
    return not find_files(os.path.join(spec, "*.tar")) and any(Path(spec).glob("**/*.parquet"))


def _survey(split: ShardSplit, workers: Workers, quiet: bool) -> tuple[Dataset, Survey]:
    """Look at every sample of a split; class names are numbers where no manifest has them."""
    if split.manifest_error:
        raise split.manifest_error
    if not split.paths:
        raise ShardError(f"{split.manifest_path}: lists no shard. Write the shards again.")
    manifest, listed = split.manifest, split.listed
    survey = survey_shards(
        [listed.get(path, Shard(path, -1)) for path in split.paths],
        manifest.label_field if manifest else "label",
        title=f"{split.name}: inspect",
        workers=workers,
        quiet=quiet,
    )
    if manifest:
        return replace(manifest, shards=survey.shards), survey
    names = tuple(map(str, range(int(survey.labels.max(initial=-1)) + 1)))
    folder = Path(split.manifest_path).absolute().parent.name
    return Dataset(folder, split.name, survey.shards, names), survey
