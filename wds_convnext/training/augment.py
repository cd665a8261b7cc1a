"""What a run does to pixels: its transform, and on the device normalize and mix.

Mixing follows timm's Mixup in batch mode: image i is blended with image B-1-i, or a box of it is
pasted in. Its numbers are drawn on the host from (seed, step, micro-batch, rank), so nothing has
to be read back from the device and nothing has to be stored to resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.rng import derive_key
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.policies import parse_policy
from wds_convnext.stream.transforms import Preprocessing, TrainTransform


def pixels_of(config: TrainConfig) -> Preprocessing:
    """How a run makes pixels of images; what its options leave open is as in version 0.1.0."""
    options: dict[str, Any] = {
        "image_size": config.image_size,
        "crop_ratio": config.crop,
        "crop_mode": config.crop_mode,
        "interpolation": config.interpolation,
        "mean": _channels(config.mean),
        "std": _channels(config.std),
    }
    try:
        return Preprocessing(**{k: v for k, v in options.items() if v is not None})
    except ValueError as error:
        raise UsageError(f"{error}. Give others with --mean and --std.") from None


def _channels(text: str | None) -> tuple[float, ...] | None:
    return None if text is None else tuple(map(float, text.split(",")))


def build_transform(config: TrainConfig, preprocessing: Preprocessing) -> TrainTransform:
    """What a run's loader does to each image."""
    return preprocessing.train_transform(
        policy=parse_policy(config.auto_augment),
        color_jitter=config.color_jitter,
        scale=(config.min_crop, 1.0),
        hflip=config.hflip,
        random_erasing=config.random_erasing,
        crop_padding=config.crop_padding,
        padding_mode=config.padding_mode,
        decoder=config.decoder,
    )


class Normalizer:
    """uint8 (B, 3, H, W) in 0..255 -> float32 channels_last, (x / 255 - mean) / std per channel.

    One kernel reads bytes and writes floats; on CUDA nothing lies between.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        shape = (1, 3, 1, 1)
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(shape)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device).view(shape)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        floats = torch.addcmul(self.shift, images, self.scale)
        return floats.contiguous(memory_format=torch.channels_last)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images -> float in [0, 1], for looking at."""
        return ((images - self.shift) / (self.scale * 255)).clamp(0, 1)


@dataclass(frozen=True)
class MixDraw:
    """How one batch is mixed: the share of each image itself, and the box pasted into it, if any.

    `box` is (top, bottom, left, right) in pixels; `share` is then the part outside it.
    """

    share: float
    box: tuple[int, int, int, int] | None = None

    def __str__(self) -> str:
        if self.box is not None:
            top, bottom, left, right = self.box
            size = f"{right - left}x{bottom - top}"
            return (
                f"cutmix, lambda {self.share:.4f}, box of {size} at {left},{top} from the partner"
            )
        return f"mixup, lambda {self.share:.4f}" if self.share < 1 else "not mixed"


@dataclass(frozen=True)
class Mixer:
    """Mixup, CutMix and label smoothing for whole batches.

    Args:
        mixup_alpha, cutmix_alpha: Beta(alpha, alpha) parameters; 0 switches one off.
        prob: share of batches that are mixed.
        switch_prob: share of CutMix among mixed batches, where both are on.
        label_smoothing: part of each target spread evenly over all classes.
        num_mixed_steps: the first step that is not mixed any more; None for all.

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899;
    batch mode and the clipped box as in timm.data.Mixup.
    """

    num_classes: int
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.1
    num_mixed_steps: int | None = None

    @property
    def mixes(self) -> bool:
        return (self.mixup_alpha > 0 or self.cutmix_alpha > 0) and self.prob > 0

    def draw(self, image_size: int, *key: int) -> MixDraw:
        """The draw that belongs to a key: (seed, step, micro-batch, rank)."""
        is_over = self.num_mixed_steps is not None and key[1] >= self.num_mixed_steps
        if is_over or not self.mixes:
            return MixDraw(1.0)
        rng = np.random.Generator(np.random.Philox(derive_key("mix", *key)))
        if rng.random() >= self.prob:
            return MixDraw(1.0)
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        use_cutmix = rng.random() < self.switch_prob if both else self.cutmix_alpha > 0
        if not use_cutmix:
            return MixDraw(float(rng.beta(self.mixup_alpha, self.mixup_alpha)))
        share = rng.beta(self.cutmix_alpha, self.cutmix_alpha)
        side = int(image_size * np.sqrt(1 - share))
        center_y, center_x = rng.integers(0, image_size, size=2)
        top, bottom = np.clip([center_y - side // 2, center_y + (side + 1) // 2], 0, image_size)
        left, right = np.clip([center_x - side // 2, center_x + (side + 1) // 2], 0, image_size)
        share = 1 - (bottom - top) * (right - left) / image_size**2
        return MixDraw(float(share), (int(top), int(bottom), int(left), int(right)))

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, draw: MixDraw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch with itself, reversed.

        Args:
            images: float (B, 3, H, W); may be changed in place.
            labels: int64 (B,), in [0, num_classes).
        Returns:
            Images, and soft targets, float32 (B, num_classes), whose rows sum to 1.
        """
        if draw.box is not None:
            top, bottom, left, right = draw.box
            images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        elif draw.share < 1:
            images = torch.lerp(images.flip(0), images, draw.share)
        targets = self._targets(labels)
        if draw.share < 1:
            targets = torch.lerp(targets.flip(0), targets, draw.share)
        return images, targets

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        off = self.label_smoothing / self.num_classes
        on = 1 - self.label_smoothing + off
        shape = (len(labels), self.num_classes)
        targets = torch.full(shape, off, dtype=torch.float32, device=labels.device)
        return targets.scatter_(1, labels.unsqueeze(1), on)


def build_mixer(config: TrainConfig, num_classes: int, order: TrainOrder | None) -> Mixer:
    """How a run mixes each batch; without an order, also in --mixing-off-epochs."""
    num_mixed_steps = None
    if order and config.mixing_off_epochs:
        num_mixed_steps = order.num_steps(config.epochs - config.mixing_off_epochs)
    assert config.label_smoothing is not None  # a config fills it in
    return Mixer(
        num_classes,
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.switch_prob,
        label_smoothing=config.label_smoothing,
        num_mixed_steps=num_mixed_steps,
    )
