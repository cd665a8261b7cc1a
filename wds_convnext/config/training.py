"""The options of a training run."""

import math
from dataclasses import dataclass

import click

from wds_convnext.config.fields import (
    COUNT,
    DECODER,
    FRACTION,
    IMAGE_SIZE,
    NON_NEGATIVE,
    POSITIVE,
    SEED,
    WORKERS,
    Config,
    FiniteRange,
    option,
)
from wds_convnext.errors import UsageError

# lr 4e-3 belongs to global batch 4096 (facebookresearch/ConvNeXt, TRAINING.md).
REFERENCE_LR, REFERENCE_BATCH_SIZE = 4e-3, 4096
WARMUP_EPOCHS = 5.0  # the article's; of a run that is short, a tenth of it


@dataclass(frozen=True)
class TrainConfig(Config):
    """Everything that decides a training run. The defaults are the article's."""

    shards: str | None = option(
        None,
        "Training shards: 'data/train-<000..012>.tar', "
        "'data/train-{000..012}.tar', a glob, a manifest, a folder (its training split), or a "
        "comma list.",
        group="Data",
    )
    val_shards: str | None = option(
        None,
        "Validation shards. Default: validation-* or val-* in the folder of the training shards.",
        group="Data",
    )
    image_size: int = option(
        224,
        "Side of the square the model sees, in pixels; evaluation "
        "resizes the short side to 8/7 of it and crops the center.",
        group="Data",
        type=IMAGE_SIZE,
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

    min_crop: float = option(
        0.08,
        "Smallest share of an image's area that a random crop takes.",
        group="Augmentation",
        type=FiniteRange(0, 1, min_open=True),
    )
    hflip: float = option(
        0.5, "Probability of a horizontal flip.", group="Augmentation", type=FRACTION
    )
    color_jitter: float = option(
        0.4,
        "Range of brightness, contrast and saturation factors, 1 +- this; 0 for none.",
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
    label_smoothing: float = option(
        0.1, "Part of each target spread over all classes.", group="Augmentation", type=FRACTION
    )

    model: str = option("convnext_base", "Any timm model, by name.", group="Model")
    drop_path_rate: float = option(
        0.2, "Stochastic depth: the last block's drop rate.", group="Model", type=FRACTION
    )
    init_from: str | None = option(
        None, "Start from a timm state dict (fine-tuning).", group="Model"
    )
    ema_decay: float = option(
        0.0,
        "Decay of an average of the weights, which is then validated and evaluated; 0 for none.",
        group="Model",
        type=FiniteRange(0, 1, max_open=True),
    )

    epochs: int = option(300, "Passes over the training samples.", group="Optimization", type=COUNT)
    max_steps: int | None = option(
        None,
        "Stop after so many steps; the schedule stays that of --epochs.",
        group="Optimization",
        type=COUNT,
    )
    batch_size: int = option(
        160, "Samples per batch and process.", group="Optimization", type=COUNT
    )
    accumulate: int = option(1, "Batches per optimizer step.", group="Optimization", type=COUNT)
    lr: float = option(REFERENCE_LR, "Peak learning rate.", group="Optimization", type=POSITIVE)
    scale_lr: str = option(
        "none",
        "Scale --lr with the global batch: with its ratio to --reference-batch-size, or with the "
        "ratio's square root.",
        group="Optimization",
        type=click.Choice(["none", "linear", "sqrt"]),
    )
    reference_batch_size: int = option(
        REFERENCE_BATCH_SIZE,
        "Global batch size that --lr was chosen for; 4e-3 belongs to 4096 "
        "(facebookresearch/ConvNeXt, TRAINING.md).",
        group="Optimization",
        type=COUNT,
    )
    weight_decay: float = option(
        0.05,
        "Decoupled decay of tensors with more than one dimension.",
        group="Optimization",
        type=NON_NEGATIVE,
    )
    warmup_epochs: float | None = option(
        None,
        "Epochs in which the learning rate rises linearly. Default: 5, or a tenth of a run of "
        "at most 15 epochs.",
        group="Optimization",
        type=NON_NEGATIVE,
    )
    warmup_lr: float = option(
        1e-6, "Learning rate of the first step.", group="Optimization", type=NON_NEGATIVE
    )
    min_lr: float = option(
        2e-6, "Learning rate of the last step.", group="Optimization", type=NON_NEGATIVE
    )
    clip_grad_norm: float = option(
        1.0,
        "Largest norm of all gradients together; 0 for no limit.",
        group="Optimization",
        type=NON_NEGATIVE,
    )
    on_nonfinite: str = option(
        "stop",
        "When a loss or gradient is not finite: end the run, or leave that step out.",
        group="Optimization",
        type=click.Choice(["stop", "skip"]),
    )
    max_skips: int = option(
        10,
        "Steps in a row that --on-nonfinite skip may leave out; one more ends the run.",
        group="Optimization",
        type=COUNT,
    )

    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.", group="Machine")
    amp: str = option(
        "auto",
        "Mixed precision: auto takes bf16 where the GPU has it, else fp16; none on a CPU.",
        group="Machine",
        type=click.Choice(["auto", "bf16", "fp16", "off"]),
    )
    compile: bool | None = option(None, "Compile the model. Default: on CUDA.", group="Machine")
    profile: bool = option(
        False,
        "Write trace.json of the sixth to eighth step into the run's folder (for Perfetto).",
        group="Machine",
    )

    seed: int = option(
        0,
        "Decides order, augmentation, mixing and starting weights.",
        group="Run",
        type=SEED,
    )
    out: str | None = option(
        None, "Folder of the run. Default: runs/<model>-<time>.", group="Run", is_output=True
    )
    log_every: int = option(20, "Steps between log lines.", group="Run", type=COUNT)
    val_every: int = option(
        10,
        "Epochs between validations; the last epoch is always validated.",
        group="Run",
        type=COUNT,
    )
    save_every: int = option(1000, "Steps between checkpoints.", group="Run", type=COUNT)
    keep: int = option(
        2, "Checkpoints kept besides last.pt and best.pt.", group="Run", type=click.IntRange(min=0)
    )
    resume: str | None = option(
        None,
        "Continue a run: its folder or a checkpoint; alone, the run in --out or the newest.",
        group="Run",
        flag_value="newest",
    )
    overwrite: bool = option(
        False, "Delete the run that --out holds, and start from scratch.", group="Run"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume is not None and self.overwrite:
            raise UsageError(
                "--resume and --overwrite exclude each other: one continues the run, the other "
                "deletes it. Give one."
            )
        if self.mixture is not None:
            self._take_shards_of_mixture()
        if self.warmup_epochs is None:
            is_short = self.epochs <= 3 * WARMUP_EPOCHS
            warmup_epochs = self.epochs / 10 if is_short else WARMUP_EPOCHS
            object.__setattr__(self, "warmup_epochs", warmup_epochs)
        if self.batch_size % 2 and (self.mixup or self.cutmix) and self.mix_prob:
            raise UsageError(
                f"--batch-size {self.batch_size}: mixing blends pairs, so it must be even. "
                f"Use {self.batch_size + 1}, or --mixup 0 --cutmix 0."
            )

    def _take_shards_of_mixture(self) -> None:
        shards = ",".join(self.mixture_parts)
        if self.shards not in (None, shards):
            raise UsageError(
                f"--shards {self.shards}: --mixture names the training shards. Leave --shards out."
            )
        if self.balance != "none":
            raise UsageError(
                f"--balance {self.balance} and --mixture exclude each other: an epoch is shared "
                "out to classes or to sets. Give one."
            )
        object.__setattr__(self, "shards", shards)

    @property
    def mixture_parts(self) -> dict[str, float]:
        """The weight of each part of the mixture, by its spec.

        Raises:
            UsageError: if it is not a list of SPEC=WEIGHT.
        """
        weights: dict[str, float] = {}
        for part in (self.mixture or "").split(","):
            spec, _, text = part.rpartition("=")
            try:
                weight = float(text)
            except ValueError:
                weight = math.nan
            if not spec or spec in weights or not 0 < weight < math.inf:
                raise UsageError(
                    f"--mixture {self.mixture}: {part!r} does not name a set and its weight once. "
                    "Write a/train.json=2,b/train.json=1."
                )
            weights[spec] = weight
        return weights

    def require_shards(self) -> str:
        """The shards; a run that is resumed takes them from its config.toml.

        Raises:
            UsageError: if none are named.
        """
        if self.shards is None:
            raise UsageError(
                "--shards is missing. Name them: --shards 'data/train-<000..012>.tar'."
            )
        return self.shards


@dataclass(frozen=True)
class DoctorConfig(TrainConfig):
    """A training that `wds-convnext doctor` looks at before it is started, and how."""

    ranks: int = option(
        1, "Processes of the training, all on one machine.", group="Doctor", type=COUNT
    )
    step: bool = option(
        False,
        "Also measure the training step on this device, and compare the loader with it.",
        group="Doctor",
    )
    json: bool = option(False, "Print one JSON object.", group="Doctor")
    jobs: int | None = option(
        None,
        "Processes that look at the samples. Default: one per CPU core.",
        group="Doctor",
        type=COUNT,
    )
