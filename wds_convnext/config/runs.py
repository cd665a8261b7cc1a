"""The options of the commands about runs that were trained."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import (
    COUNT,
    DECODER,
    FRACTION,
    IMAGE_SIZE,
    WORKERS,
    FiniteRange,
    option,
)
from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import UsageError


@dataclass(frozen=True)
class EvalConfig(RemoteConfig):
    """What `wds-convnext eval` measures."""

    checkpoint: str | None = option(
        None,
        "A checkpoint or a run folder (its best.pt). Default: the newest run under runs/.",
        group="Evaluation",
    )
    shards: str | None = option(
        None,
        "Shards to evaluate on; of a folder its validation split. Default: those that the run was "
        "validated on.",
        group="Evaluation",
    )
    image_size: int | None = option(
        None,
        "Side of the square the model sees, in pixels. Default: as in training.",
        group="Pixels",
        type=IMAGE_SIZE,
    )
    crop: float | None = option(
        None,
        "Share of the resized image's short side that the square takes; 1 for all of it. Default: "
        "as the checkpoint says, 0.875.",
        group="Pixels",
        type=FiniteRange(0, 1, min_open=True),
    )
    tta: str = option(
        "none",
        "Test-time augmentation: flip takes the mean of the logits of each image and its mirror "
        "image; flip-shift, for small images, of both in three places, a pixel apart.",
        group="Pixels",
        type=click.Choice(["none", "flip", "flip-shift"]),
    )
    batch_size: int = option(160, "Samples per batch and process.", group="Evaluation", type=COUNT)
    workers: int | None = option(
        None,
        "Processes that decode images. Default: one per CPU core, at most 16.",
        group="Evaluation",
        type=WORKERS,
    )
    decoder: str = option("auto", "As in training.", group="Evaluation", type=DECODER)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.", group="Evaluation")
    amp: str = option(
        "auto",
        "Mixed precision, as in training.",
        group="Evaluation",
        type=click.Choice(["auto", "bf16", "fp16", "off"]),
    )
    max_bad_samples: float = option(
        0.0, "Share of samples that may fail to decode.", group="Evaluation", type=FRACTION
    )
    json: bool = option(
        False, "Print one JSON object; of several checkpoints a list.", group="Evaluation"
    )


@dataclass(frozen=True)
class ExplainConfig(RemoteConfig):
    """What `wds-convnext explain` is asked."""

    step: int | None = option(
        None,
        "Name what this step gets; the first is step 0.",
        group="Question",
        type=click.IntRange(min=0),
    )
    key: str | None = option(
        None,
        "Name the steps that get this sample: its key, or its number in the data set.",
        group="Question",
    )
    shards: str | None = option(
        None,
        "Where the training shards are now. Default: where the run had them.",
        group="Question",
    )
    sheet: str | None = option(
        None,
        "Draw the step's images as the model sees them, augmented and mixed, to this PNG file.",
        group="Output",
        is_output=True,
    )
    json: bool = option(False, "Print one JSON object.", group="Output")

    def require_one(self) -> None:
        """Refuse a question that is none, or more than one.

        Raises:
            UsageError: unless either a step or a key is named; for a sheet without a step.
        """
        if (self.step is None) == (self.key is None):
            found = "neither is" if self.step is None else "both are"
            raise UsageError(f"--step, --key: {found} given, expected one. Give --step 0.")
        if self.sheet is not None and self.step is None:
            raise UsageError(f"--sheet {self.sheet}: it shows a step. Give --step.")
