"""The options of a training run."""

import math
import os
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
    AutoAugment,
    Channels,
    FiniteRange,
    KeyValue,
    option,
)
from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import UsageError

# lr 4e-3 belongs to global batch 4096 (facebookresearch/ConvNeXt, TRAINING.md).
REFERENCE_LR, REFERENCE_BATCH_SIZE = 4e-3, 4096
WARMUP_EPOCHS = 5.0  # the article's; of a run that is short, a tenth of it
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_MIN_CROP = 0.08  # torchvision's
_MODEL, _IMAGE_SIZE = "convnext_base", 224  # the article's


def local_source(pretrained: str) -> str | None:
    """The path that a --pretrained names; None if it names a tag of timm's or a repository."""
    if pretrained.startswith("hf-hub:"):
        return None
    path = pretrained.removeprefix("local-dir:")
    is_path = path != pretrained or os.sep in path or path.endswith(_WEIGHT_FILES)
    return path if is_path or os.path.exists(path) else None


@dataclass(frozen=True)
class TrainConfig(RemoteConfig):
    """Everything that decides a training run. The defaults are the article's."""

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
    image_size: int | None = option(
        None,
        "Side of the square the model sees, in pixels. Default: what --pretrained was trained "
        "with, else 224.",
        group="Pixels",
        type=IMAGE_SIZE,
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
        _MIN_CROP,
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

    model: str | None = option(
        None,
        "Any timm model, by name. Default: that of --pretrained, else convnext_base.",
        group="Model",
    )
    model_arg: tuple[str, ...] = option(
        (),
        "An argument for timm's model, KEY=VALUE, such as drop_rate=0.2 or img_size=64. May be "
        "repeated.",
        group="Model",
        type=KeyValue(),
    )
    drop_path_rate: float = option(
        0.2, "Stochastic depth: the last block's drop rate.", group="Model", type=FRACTION
    )
    pretrained: str | None = option(
        None,
        "Start from weights that others trained, with the pixels they were trained on: a tag of "
        "timm's (convnext_tiny.fb_in22k_ft_in1k), hf-hub:owner/name, local-dir:folder, a "
        ".safetensors or .pth file; alone, the default tag of --model.",
        group="Model",
        flag_value="default",
    )
    init_from: str | None = option(
        None,
        "Start from the weights in a file, and from nothing else of it: pixels are those of the "
        "options.",
        group="Model",
    )
    freeze: str | None = option(
        None,
        "Keep the parameters as they are whose name this regular expression finds, and their "
        "BatchNorm in evaluation mode: '^(stem|stages.[01])'.",
        group="Model",
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
        "Stop after so many steps; the schedule stays that of --epochs. 0 validates and saves "
        "the starting weights.",
        group="Optimization",
        type=click.IntRange(min=0),
    )
    early_stop: int | None = option(
        None,
        "Finish after so many validations in a row without a better accuracy.",
        group="Optimization",
        type=COUNT,
    )
    batch_size: int = option(
        160, "Samples per batch and process.", group="Optimization", type=COUNT
    )
    accumulate: int = option(1, "Batches per optimizer step.", group="Optimization", type=COUNT)
    optimizer: str = option(
        "adamp",
        "adamp, or timm's adamw, sgd (Nesterov's), lion or muon. --lr is meant for adamp and "
        "adamw; sgd adds weight decay to the gradient.",
        group="Optimization",
        type=click.Choice(["adamp", "adamw", "sgd", "lion", "muon"]),
    )
    momentum: float | None = option(
        None,
        "Momentum of sgd and muon. Default: 0.9.",
        group="Optimization",
        type=FiniteRange(0, 1, max_open=True),
    )
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
    layer_decay: float | None = option(
        None,
        "Factor on the learning rate from each of timm's layers to the one below it.",
        group="Optimization",
        type=FiniteRange(0, 1, min_open=True),
    )
    head_lr: float | None = option(
        None,
        "Peak learning rate of the classifier, on the schedule of --lr. Default: --lr.",
        group="Optimization",
        type=POSITIVE,
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
        if self.pretrained is not None and self.init_from is not None:
            raise UsageError(
                f"--init-from {self.init_from}: --pretrained {self.pretrained} is given as well. "
                "Give the file to one of them; --pretrained takes the pixels over, too."
            )
        if self.pretrained is None:  # else `with_pretrained` fills in what is not given
            object.__setattr__(self, "model", self.model or _MODEL)
            object.__setattr__(self, "image_size", self.image_size or _IMAGE_SIZE)
        if self.color_jitter is None:
            jitter = {"none": 0.4, "3a": 0.3}.get(self.auto_augment, 0.0)
            object.__setattr__(self, "color_jitter", jitter)
        if self.warmup_epochs is None:
            is_short = self.epochs <= 3 * WARMUP_EPOCHS
            warmup_epochs = self.epochs / 10 if is_short else WARMUP_EPOCHS
            object.__setattr__(self, "warmup_epochs", warmup_epochs)
        self._check_optimizer_and_crop()
        if self.batch_size % 2 and (self.mixup or self.cutmix) and self.mix_prob:
            raise UsageError(
                f"--batch-size {self.batch_size}: mixing blends pairs, so it must be even. "
                f"Use {self.batch_size + 1}, or --mixup 0 --cutmix 0."
            )

    def _check_optimizer_and_crop(self) -> None:
        if self.momentum is not None and self.optimizer not in ("sgd", "muon"):
            raise UsageError(
                f"--momentum {self.momentum:g}: --optimizer {self.optimizer} has none of that "
                "name. Leave it out, or use sgd or muon."
            )
        if self.crop_padding is None and self.padding_mode != "constant":
            raise UsageError(
                f"--padding-mode {self.padding_mode}: nothing is padded. Add --crop-padding 4, or "
                "leave it out."
            )
        if self.crop_padding is not None and self.min_crop != _MIN_CROP:
            raise UsageError(
                f"--min-crop {self.min_crop:g} and --crop-padding {self.crop_padding} exclude each "
                "other: a crop has a random size, or that of --image-size. Leave one out; a "
                f"recipe's is undone by --min-crop {_MIN_CROP}."
            )
        if self.image_size and (self.crop_padding or 0) >= self.image_size:
            raise UsageError(
                f"--crop-padding {self.crop_padding}: expected less than --image-size "
                f"{self.image_size}. An eighth of it is usual."
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
