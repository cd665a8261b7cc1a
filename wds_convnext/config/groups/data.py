"""Options of the samples and their pixels."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import (
    COUNT,
    DECODER,
    FRACTION,
    IMAGE_SIZE,
    WORKERS,
    Channels,
    Config,
    FiniteRange,
    option,
)
from wds_convnext.config.sizes import SizeSchedule


@dataclass(frozen=True)
class DataOptions(Config):
    """Which samples, and how often each."""

    shards: str | None = option(
        None,
        "Training shards: 'data/train-<000..012>.tar', "
        "'data/train-{000..012}.tar', a glob, a manifest, a folder (its training split), a URL of "
        "these (s3://bucket/data/train.json), or a comma list.",
        group="Data",
    )
    val_shards: str | None = option(
        None,
        "Validation shards. Default: validation-* or val-* in the folder of the training shards.",
        group="Data",
    )
    shuffle_buffer: int = option(
        100_000,
        "Samples shuffled together. References, so it costs no "
        "memory; at least the data set's size for a uniform order.",
        group="Data",
        type=COUNT,
    )
    balance: str = option(
        "none",
        "How often classes come in an epoch: none (as they are), classes (all equally), sqrt "
        "(by the root of their sizes), or a JSON file of weights by class name. Exact, see "
        "docs/data.md.",
        group="Data",
    )
    mixture: str | None = option(
        None,
        "Training sets and the weight of each in an epoch, in place of --shards: "
        "'a/train.json=2,b/train.json=1'.",
        group="Data",
    )
    epoch_samples: int | None = option(
        None,
        "Samples of an epoch. Default: as many as the training shards hold.",
        group="Data",
        type=COUNT,
    )
    workers: int | None = option(
        None,
        "Processes that decode images; 0 decodes in the trainer. "
        "Default: one per CPU core, at most 16.",
        group="Data",
        type=WORKERS,
    )
    decoder: str = option(
        "auto",
        "What decodes JPEGs, all to the same pixels: nvimgcodec (decodes only the crop; with "
        "auto for samples that `shards` or `index --check decode` have seen decode), simplejpeg "
        "or pillow.",
        group="Data",
        type=DECODER,
    )
    check_shards: bool = option(
        False,
        "Compare every shard's SHA-256 with its manifest before starting.",
        group="Data",
    )
    max_bad_samples: float = option(
        0.001,
        "Share of an epoch's samples that may be replaced because they do not decode.",
        group="Data",
        type=FRACTION,
    )
    max_bad_val_samples: float = option(
        0.1,
        "Share of the validation samples that may be left out because they do not decode.",
        group="Data",
        type=FRACTION,
    )


@dataclass(frozen=True)
class PixelOptions(Config):
    """What the model sees of an image, in training and evaluation."""

    image_size: int | None = option(
        None,
        "Side of the square the model sees, in pixels. Default: what --pretrained was trained "
        "with, else 224.",
        group="Pixels",
        type=IMAGE_SIZE,
    )
    image_size_schedule: str | None = option(
        None,
        "Train on smaller images first, as 0:128,0.4:160,0.8:224: a size, and the share of the "
        "run's steps from which it is used. The last one is --image-size, which evaluation has.",
        group="Pixels",
        type=SizeSchedule(),
    )
    crop: float | None = option(
        None,
        "Share of the resized image's side that evaluation crops. Default: that of --pretrained, "
        "else 0.875.",
        group="Pixels",
        type=FiniteRange(0, 1, min_open=True),
    )
    crop_mode: str | None = option(
        None,
        "How evaluation makes a square of an image: of its short side, of both sides whatever the "
        "shape, or of the long side with a border. Default: that of --pretrained, else center.",
        group="Pixels",
        type=click.Choice(["center", "squash", "border"]),
    )
    interpolation: str | None = option(
        None,
        "How images are resized, antialiased. Default: that of --pretrained, else bilinear.",
        group="Pixels",
        type=click.Choice(["bilinear", "bicubic"]),
    )
    mean: str | None = option(
        None,
        "Mean of red, green and blue, of pixels in [0, 1]. Default: that of --pretrained, else "
        "ImageNet's.",
        group="Pixels",
        type=Channels(),
    )
    std: str | None = option(
        None,
        "Their standard deviation. Default: that of --pretrained, else ImageNet's.",
        group="Pixels",
        type=Channels(),
    )
