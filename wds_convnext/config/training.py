"""The options of a training run, by the groups of its help, and what they exclude."""

import math
import os
from dataclasses import dataclass

from wds_convnext.config.fields import COUNT, option
from wds_convnext.config.groups.augmentation import MIN_CROP, AugmentationOptions
from wds_convnext.config.groups.data import DataOptions, PixelOptions
from wds_convnext.config.groups.model import ModelOptions
from wds_convnext.config.groups.optimization import OptimizationOptions
from wds_convnext.config.groups.running import MachineOptions, RunOptions
from wds_convnext.config.remote import RemoteConfig
from wds_convnext.config.sizes import size_shares
from wds_convnext.errors import UsageError

WARMUP_EPOCHS = 5.0  # the article's; of a run that is short, a tenth of it
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
DEFAULT_MODEL, _IMAGE_SIZE = "convnext_base", 224  # the article's


def local_source(pretrained: str) -> str | None:
    """The path that a --pretrained names; None if it names a tag of timm's or a repository."""
    if pretrained.startswith("hf-hub:"):
        return None
    path = pretrained.removeprefix("local-dir:")
    is_path = path != pretrained or os.sep in path or path.endswith(_WEIGHT_FILES)
    return path if is_path or os.path.exists(path) else None


@dataclass(frozen=True)
class TrainConfig(
    RemoteConfig,
    RunOptions,
    MachineOptions,
    OptimizationOptions,
    ModelOptions,
    AugmentationOptions,
    PixelOptions,
    DataOptions,  # dataclasses take fields from the last base first: help begins with the data
):
    """Everything that decides a training run. The defaults are the article's."""

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
        if self.image_size_schedule is not None:
            self._take_size_of_schedule(size_shares(self.image_size_schedule)[-1][1])
        if self.pretrained is None:  # else `with_pretrained` fills in what is not given
            object.__setattr__(self, "model", self.model or DEFAULT_MODEL)
            object.__setattr__(self, "image_size", self.image_size or _IMAGE_SIZE)
        if self.color_jitter is None:
            jitter = {"none": 0.4, "3a": 0.3}.get(self.auto_augment, 0.0)
            object.__setattr__(self, "color_jitter", jitter)
        if self.warmup_epochs is None:
            is_short = self.epochs <= 3 * WARMUP_EPOCHS
            warmup_epochs = self.epochs / 10 if is_short else WARMUP_EPOCHS
            object.__setattr__(self, "warmup_epochs", warmup_epochs)
        if self.label_smoothing is None:
            object.__setattr__(self, "label_smoothing", 0.0 if self.loss == "bce" else 0.1)
        self._check_optimizer_and_crop()
        self._check_targets()
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
        if self.crop_padding is not None and self.min_crop != MIN_CROP:
            raise UsageError(
                f"--min-crop {self.min_crop:g} and --crop-padding {self.crop_padding} exclude each "
                "other: a crop has a random size, or that of --image-size. Leave one out; a "
                f"recipe's is undone by --min-crop {MIN_CROP}."
            )
        if self.image_size and (self.crop_padding or 0) >= self.size_shares[0][1]:
            raise UsageError(
                f"--crop-padding {self.crop_padding}: expected less than --image-size, here "
                f"{self.size_shares[0][1]}. An eighth of it is usual."
            )

    def _check_targets(self) -> None:
        if self.loss == "bce" and self.label_smoothing:
            raise UsageError(
                f"--loss bce and --label-smoothing {self.label_smoothing:g} exclude each other: "
                "every class with a part of a target counts as present. Give --label-smoothing 0."
            )
        if self.mixing_off_epochs > self.epochs:
            raise UsageError(
                f"--mixing-off-epochs {self.mixing_off_epochs}: expected at most --epochs "
                f"{self.epochs}."
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

    def _take_size_of_schedule(self, size: int) -> None:
        if self.image_size not in (None, size):
            raise UsageError(
                f"--image-size-schedule {self.image_size_schedule}: ends with {size}, and "
                f"--image-size is {self.image_size}. Give --image-size {size}, or another end."
            )
        object.__setattr__(self, "image_size", size)

    @property
    def size_shares(self) -> list[tuple[float, int]]:
        """The image sizes of the run, each with the share of its steps from which it is used."""
        if self.image_size_schedule is not None:
            return size_shares(self.image_size_schedule)
        assert self.image_size is not None  # `with_pretrained` filled it in
        return [(0.0, self.image_size)]

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
