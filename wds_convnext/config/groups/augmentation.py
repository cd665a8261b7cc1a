"""Options of the augmentation and the mixing of images."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import (
    COUNT,
    FRACTION,
    NON_NEGATIVE,
    AutoAugment,
    Config,
    FiniteRange,
    option,
)

MIN_CROP = 0.08  # torchvision's


@dataclass(frozen=True)
class AugmentationOptions(Config):
    """What is drawn for each image and batch."""

    min_crop: float = option(
        MIN_CROP,
        "Smallest share of an image's area that a random crop takes.",
        group="Augmentation",
        type=FiniteRange(0, 1, min_open=True),
    )
    crop_padding: int | None = option(
        None,
        "Instead, crop a square of --image-size from the image resized to it (its short side) with "
        "so many pixels around: 4 is usual for images of 32.",
        group="Augmentation",
        type=click.IntRange(min=0),
    )
    padding_mode: str = option(
        "constant",
        "What these pixels are: black, or the image mirrored.",
        group="Augmentation",
        type=click.Choice(["constant", "reflect"]),
    )
    hflip: float = option(
        0.5, "Probability of a horizontal flip.", group="Augmentation", type=FRACTION
    )
    repeated_augmentation: int = option(
        1,
        "How often a sample comes in a row, each time with other draws. An epoch stays as long, so "
        "it has the N-th part of the samples.",
        group="Augmentation",
        type=COUNT,
    )
    auto_augment: str = option(
        "none",
        "Operations on the crop: none, trivial (TrivialAugment), 3a (3-Augment of DeiT III) or "
        "rand-m9-n2 (RandAugment: magnitude, number).",
        group="Augmentation",
        type=AutoAugment(),
    )
    color_jitter: float | None = option(
        None,
        "Range of brightness, contrast and saturation factors, 1 +- this; 0 for none. Default: "
        "0.4, with --auto-augment 3a 0.3, with the others 0.",
        group="Augmentation",
        type=FRACTION,
    )
    random_erasing: float = option(
        0.0,
        "Probability that a rectangle of an image is replaced by noise, on the device.",
        group="Augmentation",
        type=FRACTION,
    )
    mixup: float = option(
        0.8, "Mixup's alpha; 0 for none.", group="Augmentation", type=NON_NEGATIVE
    )
    cutmix: float = option(
        1.0, "CutMix's alpha; 0 for none.", group="Augmentation", type=NON_NEGATIVE
    )
    mix_prob: float = option(
        1.0, "Share of batches that are mixed.", group="Augmentation", type=FRACTION
    )
    switch_prob: float = option(
        0.5, "Share of CutMix among mixed batches.", group="Augmentation", type=FRACTION
    )
    mixing_off_epochs: int = option(
        0,
        "Last epochs in which nothing is mixed.",
        group="Augmentation",
        type=click.IntRange(min=0),
    )
    label_smoothing: float | None = option(
        None,
        "Part of each target spread over all classes. Default: 0.1, with --loss bce 0.",
        group="Augmentation",
        type=FRACTION,
    )
