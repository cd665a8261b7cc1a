"""The options of the commands about shards: make, verify, describe, index and time them."""

from dataclasses import dataclass
from typing import Any

import click

from wds_convnext.config.fields import (
    COUNT,
    DECODER,
    FRACTION,
    IMAGE_SIZE,
    POSITIVE,
    QUALITY,
    SEED,
    SHARE,
    WORKERS,
    AutoAugment,
    ByteSize,
    Config,
    FiniteRange,
    PartOf,
    flag_of,
    option,
)
from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import UsageError

ENGINE: Any = option(
    None,
    "Run the work on a cluster instead: dask://HOST:PORT, a Dask scheduler. Its workers see the "
    "same folders.",
    group="Machine",
)


def refuse_jobs_of_engine(config: Any) -> None:
    """Raise UsageError if both the processes of this machine and a cluster are asked for."""
    if config.jobs is not None and config.engine is not None:
        raise UsageError("--jobs and --engine exclude each other: the cluster has its own workers.")


@dataclass(frozen=True)
class ShardsConfig(Config):
    """How a source of images becomes tar shards."""

    out: str = option("data", "Folder for the shards.", group="Output", is_output=True)
    num_shards: int | None = option(
        None,
        "Shards per split. Default: one per parquet file; else of about 256 MB.",
        group="Output",
        type=COUNT,
    )
    samples_per_shard: int | None = option(
        None, "Most samples per shard.", group="Output", type=COUNT
    )
    shard_size: int | None = option(
        None, "Bytes per shard, about: 500MB, 1GB.", group="Output", type=ByteSize()
    )
    overwrite: bool = option(
        False, "Replace shards that other options or inputs made.", group="Output"
    )
    shuffle: bool = option(
        True,
        "Spread every class of the training split evenly over its "
        "shards, in a seeded random order; or keep the stored order.",
        group="Order",
    )
    seed: int = option(0, "Seed of the shuffle.", group="Order", type=SEED)
    image_column: str | None = option(
        None,
        "Column of images. Default: the one that Hugging Face's features state, or of a usual "
        "name, or the only one of bytes.",
        group="Input",
    )
    label_column: str | None = option(
        None,
        "Column of labels. Default: the one that Hugging Face's features state, or of a usual "
        "name (label, target, class, cls, …).",
        group="Input",
    )
    val_fraction: float | None = option(
        None,
        "Take about this share of the training split for a split called validation, chosen by a "
        "hash of each image.",
        group="Input",
        type=SHARE,
    )
    test_fraction: float | None = option(
        None, "The same for a split called test.", group="Input", type=SHARE
    )
    check: str = option(
        "header",
        "Look at each image's header, or decode it whole.",
        group="Input",
        type=click.Choice(["header", "decode"]),
    )
    on_bad: str = option(
        "error",
        "Rows without a usable image or label: end with a list of "
        "them, or leave them out and list them.",
        group="Input",
        type=click.Choice(["error", "skip"]),
    )
    max_side: int | None = option(
        None,
        "Write images with a longer side than this many pixels as smaller JPEGs; copy the others.",
        group="Shrinking",
        type=IMAGE_SIZE,
    )
    quality: int | None = option(
        None,
        "JPEG quality of the images that are shrunk. Default: 90.",
        group="Shrinking",
        type=QUALITY,
    )
    jobs: int | None = option(
        None, "Processes. Default: one per CPU core.", group="Machine", type=COUNT
    )
    engine: str | None = ENGINE
    part: str | None = option(
        None,
        "Do one of several parts, each on its own machine, all with the same folder for --out: "
        "3/16, as in a job array. Then --finish.",
        group="Machine",
        type=PartOf(),
    )
    finish: bool = option(
        False, "Publish what all parts have done, or say what is missing.", group="Machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality is not None and self.max_side is None:
            raise UsageError(
                "--quality is that of images that --max-side shrinks; all others are copied as "
                "they are. Give --max-side, too."
            )
        if self.shard_size is not None and self.max_side is not None:
            raise UsageError(
                "--shard-size and --max-side exclude each other: how many bytes are left is not "
                "known before. Give --samples-per-shard or --num-shards."
            )
        sizes = ("num_shards", "samples_per_shard", "shard_size")
        given = [flag_of(name) for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other. Give one.")
        refuse_jobs_of_engine(self)
        if self.part and self.finish:
            raise UsageError("--part and --finish exclude each other. Give --finish in the end.")
        if (self.part or self.finish) and (self.val_fraction or self.test_fraction):
            raise UsageError(
                "--part with --val-fraction or --test-fraction: each part would read all images "
                "to choose the rows. Use --engine, or divide on one machine."
            )
        if (self.val_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise UsageError(
                f"--val-fraction {self.val_fraction} and --test-fraction {self.test_fraction}: "
                "nothing is left for training. Give less."
            )


@dataclass(frozen=True)
class VerifyConfig(RemoteConfig):
    """What `wds-convnext verify` compares."""

    deep: bool = option(False, "Also decode every image.", group="Checks")
    against: str | None = option(
        None,
        "The input, as it was given to the conversion: also check that each of its rows "
        "is there, once, with the same bytes and label.",
        group="Checks",
    )
    json: bool = option(False, "Print one JSON object.", group="Output")
    jobs: int | None = option(
        None, "Processes. Default: one per CPU core.", group="Machine", type=COUNT
    )
    engine: str | None = ENGINE

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_jobs_of_engine(self)


@dataclass(frozen=True)
class InspectConfig(RemoteConfig):
    """What `wds-convnext inspect` shows next to the data; the label mix is that of `train`."""

    batch_size: int = option(160, "Samples per batch and rank.", group="Label mix", type=COUNT)
    ranks: int = option(1, "Processes of the training.", group="Label mix", type=COUNT)
    shuffle_buffer: int = option(
        100_000, "Samples shuffled together.", group="Label mix", type=COUNT
    )
    seed: int = option(0, "Seed of the order.", group="Label mix", type=SEED)
    sheet: str | None = option(
        None,
        "Draw a contact sheet, a row of images per class, to this PNG file.",
        group="Output",
        is_output=True,
    )
    json: bool = option(False, "Print one JSON object.", group="Output")
    jobs: int | None = option(
        None, "Processes. Default: one per CPU core.", group="Machine", type=COUNT
    )


@dataclass(frozen=True)
class IndexConfig(RemoteConfig):
    """How `wds-convnext index` reads labels."""

    label_field: str = option(
        "label", "Field of .json members that holds the class number.", group="Labels"
    )
    class_names: str | None = option(
        None, "A file of class names, one per line. Default: the numbers.", group="Labels"
    )
    check: str = option(
        "read",
        "Read each image for its checksum, or decode it as well and note that it does: training "
        "then decodes large ones faster, see its --decoder.",
        group="Checks",
        type=click.Choice(["read", "decode"]),
    )
    out: str | None = option(
        None,
        "Folder for manifest and index of shards at URLs. Those of local ones stand next to them.",
        group="Output",
        is_output=True,
    )
    json: bool = option(False, "Print one JSON object.", group="Output")
    jobs: int | None = option(
        None, "Processes. Default: one per CPU core.", group="Machine", type=COUNT
    )
    engine: str | None = ENGINE

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_jobs_of_engine(self)


@dataclass(frozen=True)
class BenchConfig(RemoteConfig):
    """What `wds-convnext bench` loads, and for how long; the loader is that of `train`."""

    image_size: int = option(
        224, "Side of the square the model sees, in pixels.", group="Loader", type=IMAGE_SIZE
    )
    batch_size: int = option(160, "Samples per batch.", group="Loader", type=COUNT)
    auto_augment: str = option("none", "As in training.", group="Loader", type=AutoAugment())
    color_jitter: float = option(
        0.4,
        "Range of brightness, contrast and saturation factors, 1 +- this; 0 for none.",
        group="Loader",
        type=FRACTION,
    )
    decoder: str = option("auto", "As in training.", group="Loader", type=DECODER)
    shuffle_buffer: int = option(100_000, "Samples shuffled together.", group="Loader", type=COUNT)
    workers: int | None = option(
        None,
        "Measure this number of processes alone; 0 decodes in the trainer. Default: 1, 2, 4 … up "
        "to the default of train, one per CPU core, at most 16.",
        group="Loader",
        type=WORKERS,
    )
    seed: int = option(0, "Decides order and augmentation.", group="Loader", type=SEED)
    seconds: float = option(
        5.0,
        "How long each number of workers is measured, about; at least a few batches.",
        group="Measurement",
        type=FiniteRange(0, 3600, min_open=True),
    )
    target_images_per_s: float | None = option(
        None,
        "Images that the training step takes, on your GPU: say whether the loader keeps up, and "
        "with how many workers.",
        group="Measurement",
        type=POSITIVE,
    )
    json: bool = option(False, "Print one JSON object.", group="Output")


@dataclass(frozen=True)
class CacheConfig(RemoteConfig):
    """The training whose cache `wds-convnext cache` computes."""

    cache_size: int | None = option(
        None,
        "Bytes that remote shards may take on the disk: 50GB. Default: what the run needs at one "
        "time, half of the shards, and all of them.",
        group="Cache",
        type=ByteSize(),
    )
    val_shards: str | None = option(
        None,
        "Validation shards. Default: those next to the training shards, as for train.",
        group="Training",
    )
    batch_size: int = option(160, "Samples per batch and process.", group="Training", type=COUNT)
    accumulate: int = option(1, "Batches per optimizer step.", group="Training", type=COUNT)
    ranks: int = option(1, "Processes of the training.", group="Training", type=COUNT)
    nodes: int = option(
        1, "Machines that they run on, each with a cache of its own.", group="Training", type=COUNT
    )
    shuffle_buffer: int = option(
        100_000, "Samples shuffled together.", group="Training", type=COUNT
    )
    seed: int = option(0, "Seed of the order.", group="Training", type=SEED)
    epochs: int = option(4, "Epochs to look at.", group="Training", type=COUNT)
    val_every: int = option(10, "Epochs between validations.", group="Training", type=COUNT)
    workers: int | None = option(
        None,
        "Loader processes of each rank; they read ahead. Default: as for train.",
        group="Training",
        type=WORKERS,
    )
    json: bool = option(False, "Print one JSON object.", group="Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks % self.nodes:
            raise UsageError(
                f"--ranks {self.ranks}: not the same number on each of --nodes {self.nodes}. "
                "Give a multiple of it."
            )
