"""Encoded bytes -> uint8 (3, H, W), for training and for evaluation.

A transform is a frozen value and a pure function: all randomness comes in as `draws`, uniform
numbers in [0, 1) that the caller has keyed by seed, epoch and sample. Geometry, rounding and
colors are torchvision's; pixels differ from Pillow's antialiased resize by at most 2 of 255, and
so from those of timm's evaluation.

CPU ms per image, one core, 500 ImageNet photographs, medians of 9 interleaved rounds:
TrainTransform 1.38 (1.80 with color jitter), torchvision's decode_jpeg and v2 1.59, Pillow 2.21;
EvalTransform 1.67, torchvision 1.69, Pillow 2.73. Tried and lost, for training:
- Pillow's resize of the decoded crop 1.74; torchvision's 1.42, and its import in every worker.
- The crop made contiguous (3, H, W) before the resize 1.46: torch's kernel wants RGB triples.
- No antialias 1.30: other pixels.
- The resize by cykooz-resizer (fast_image_resize): 0.20 where torch's takes 0.17, 1 of 255 off. By
  torch's into the batch itself (`out=`): 0.18, and the copy saved is 0.02.
- The axis of the batch by numpy, before the resize: thumbnails of 32 px 1.06 times faster, photos
  1.07 times slower, as torch's kernel no longer sees that the bytes of a pixel stand together.
- torch's kernel without `interpolate` around it: 4 us of a thumbnail's 145, for a private name. The
  box without lists of attempts, and `try` in place of `suppress`: 1.00 (n = 21).
- Color jitter in uint8 between the three steps, as torchvision does: 0.17 more; by lookup
  tables: slower.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import permutations
from typing import Any, ClassVar

import numpy as np
import torch

from wds_convnext.shards.boxdecoder import box_decoder
from wds_convnext.shards.decode import Box, check_decoder, decode_boxes, decode_rgb, whole_image
from wds_convnext.shards.limits import ImageError, check_num_pixels
from wds_convnext.stream import erasing
from wds_convnext.stream.geometry import (
    PADDING_MODES,
    cut_out,
    random_crop_box,
    resize,
    resized_size,
)
from wds_convnext.stream.policies import Operations, Policy, apply, functional

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Box",
    "EvalTransform",
    "ImageError",
    "Preprocessing",
    "TrainTransform",
    "random_crop_box",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_ATTEMPTS = 10
_NUM_CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2
_NUM_OWN_DRAWS = _NUM_CROP_DRAWS + 5  # without a policy's


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become what a model takes: one value for training, evaluation and checkpoints.

    A value that this version cannot make is refused with a ValueError: a model that was trained
    on other pixels must not be evaluated on these.
    """

    image_size: int = 224
    crop_ratio: float = 0.875  # of evaluation, in (0, 1]: Resize(256), CenterCrop(224)
    crop_mode: str = "center"  # of evaluation, see `EvalTransform`
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of red, green, blue in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "crop_mode": ("center", "squash", "border"),
        "interpolation": ("bilinear", "bicubic"),  # antialiased
    }

    def __post_init__(self) -> None:
        for name, known in self.CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected one of {', '.join(known)}"
                )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}: expected three of each, std > 0")
        if self.image_size < 1 or not 0 < self.crop_ratio <= 1:
            raise ValueError(
                f"image_size {self.image_size}, crop_ratio {self.crop_ratio}: expected at least "
                "1, and more than 0 and at most 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in checkpoints."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Preprocessing":
        """The value that `to_dict` stored, in this version or another; unknown keys are ignored.

        Raises:
            KeyError: if image size, mean or std are missing.
            ValueError: if a value is not known here.
        """
        for name in ("image_size", "mean", "std"):
            if name not in stored:
                raise KeyError(name)
        known = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        known |= {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])}
        if known.get("interpolation") == "bilinear, antialiased":  # as version 0.1.0 wrote it
            known["interpolation"] = "bilinear"
        return cls(**known)

    def train_transform(self, **options: Any) -> "TrainTransform":
        """The transform for training; options are the other arguments of `TrainTransform`."""
        return TrainTransform(self.image_size, interpolation=self.interpolation, **options)

    def eval_transform(self, *, decoder: str = "auto") -> "EvalTransform":
        return EvalTransform(
            self.image_size,
            crop_ratio=self.crop_ratio,
            interpolation=self.interpolation,
            decoder=decoder,
            crop_mode=self.crop_mode,
            fill=tuple(round(255 * value) for value in self.mean),
        )


@dataclass(frozen=True)
class TrainTransform:
    """Encoded bytes -> uint8 (3, image_size, image_size): crop, flip, policy, color jitter.

    The crop is torchvision's RandomResizedCrop, or with `crop_padding` its RandomCrop of an image
    whose short side has been resized to image_size, as is usual for small images.

    Layout of the draws: (area, ratio) for each of the ten attempts at a crop, then top, left,
    flip, brightness, contrast, saturation, the order of these three; those of the policy; those of
    random erasing, which is done later, on the device.
    """

    image_size: int = 224
    color_jitter: float = 0.0  # factors of brightness, contrast, saturation: 1 +- value; 0: off
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5  # probability
    interpolation: str = "bilinear"
    decoder: str = "auto"  # see `decode_rgb`
    crop_padding: int | None = None  # pixels around the resized image; None: no RandomCrop
    padding_mode: str = "constant"  # black, or reflect
    policy: Policy | None = None
    random_erasing: float = 0.0  # probability

    def __post_init__(self) -> None:
        check_decoder(self.decoder)
        if self.policy is not None:
            functional()  # imported here, it is there when workers are forked
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode {self.padding_mode!r}: expected {PADDING_MODES}")
        if not 0 <= (self.crop_padding or 0) < self.image_size:
            raise ValueError(
                f"crop_padding {self.crop_padding}: expected 0 to {self.image_size - 1}, less than "
                "image_size"
            )

    def __call__(self, data: bytes, draws: np.ndarray) -> torch.Tensor:
        return self.finish(self.crop(data, draws), draws)

    def finish(self, pixels_HWC: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """The image that becomes of a crop."""
        return self.augment(self.resize(pixels_HWC, draws), draws)

    @property
    def NUM_DRAWS(self) -> int:
        of_erasing = erasing.NUM_DRAWS if self.random_erasing else 0
        return _NUM_OWN_DRAWS + (self.policy.NUM_DRAWS if self.policy else 0) + of_erasing

    def for_known(self) -> "TrainTransform":
        """The same for images that are known to decode: `auto` is nvImageCodec if that works here.

        In processes that multiprocessing started alone, as loader workers are: nvImageCodec listens
        to stderr, to which other threads of a trainer may write.
        """
        if self.decoder == "auto" and multiprocessing.parent_process() and box_decoder():
            return replace(self, decoder="nvimgcodec")
        return self

    def crop(self, data: bytes, draws: np.ndarray) -> np.ndarray:
        """The pixels of the random crop, uint8 (H, W, 3); all, if it follows the resize."""
        return decode_rgb(data, partial(self.crop_box, draws), decoder=self.decoder)

    def crops(self, images: Sequence[bytes], draws: np.ndarray) -> list[np.ndarray | None]:
        """The crops of several images, by nvImageCodec in one call; None for what `crop` is for."""
        return decode_boxes(images, [partial(self.crop_box, row) for row in draws])

    def crop_box(self, draws: np.ndarray, height: int, width: int) -> Box:
        """The random crop of an image of that size; all of it, if the crop follows the resize."""
        if self.crop_padding is not None:
            return whole_image(height, width)
        crop_draws = draws[:_NUM_CROP_DRAWS].tolist()
        return random_crop_box(crop_draws, height, width, scale=self.scale, ratio=self.ratio)

    def resize(self, pixels_HWC: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """The crop in its final size, flipped or not."""
        if self.crop_padding is None:
            image = resize(pixels_HWC, self.image_size, self.image_size, self.interpolation)
        else:
            size, box = self.crop_place(draws, *pixels_HWC.shape[:2])
            check_num_pixels(*size)  # as in `EvalTransform`
            image = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
            if size != pixels_HWC.shape[:2]:
                image = resize(pixels_HWC, *size, self.interpolation)
            image = cut_out(image, box, padding_mode=self.padding_mode)
        return image.flip(-1) if self.flips(draws) else image

    def crop_place(self, draws: np.ndarray, height: int, width: int) -> tuple[tuple[int, int], Box]:
        """The size (height, width) in which an image of that size is cropped, and the crop there.

        With `crop_padding` that is the size after the resize, and the box may be outside by so
        many pixels.
        """
        if self.crop_padding is None:
            return (height, width), self.crop_box(draws, height, width)
        padding = self.crop_padding
        size = resized_size(height, width, self.image_size)
        top, left = (
            int(draw * (side + 2 * padding - self.image_size + 1)) - padding
            for draw, side in zip(draws[_NUM_CROP_DRAWS - 2 : _NUM_CROP_DRAWS].tolist(), size)
        )
        return size, Box(top, left, self.image_size, self.image_size)

    def flips(self, draws: np.ndarray) -> bool:
        return bool(draws[_NUM_CROP_DRAWS] < self.hflip)

    def augment(self, image: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """The image after the policy's operations and color jitter, in DeiT III's order."""
        image = apply(image, self.operations(draws))
        factors = self.color_factors(draws)
        return _adjust_color(image, factors) if factors else image

    def operations(self, draws: np.ndarray) -> Operations:
        """The policy's operations for an image, in the order they are applied in."""
        if self.policy is None:
            return []
        of_policy = draws[_NUM_OWN_DRAWS : _NUM_OWN_DRAWS + self.policy.NUM_DRAWS]
        return self.policy.choose(of_policy, self.image_size)

    def erasure(self, draws: np.ndarray) -> np.ndarray:
        """What random erasing does to the image, see `erasing.erasure`."""
        of_erasing = draws[-erasing.NUM_DRAWS :]
        return erasing.erasure(of_erasing, self.image_size, probability=self.random_erasing)

    def color_factors(self, draws: np.ndarray) -> dict[str, float]:
        """The factors of brightness, contrast and saturation, in the order they are applied in."""
        if self.color_jitter <= 0:
            return {}
        *factor_draws, order = draws[_NUM_CROP_DRAWS + 1 : _NUM_OWN_DRAWS].tolist()
        low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
        factors = [low + draw * (high - low) for draw in factor_draws]
        orders = list(permutations(zip(_ADJUSTMENTS, factors)))
        return dict(orders[int(order * len(orders))])


@dataclass(frozen=True)
class EvalTransform:
    """Encoded bytes -> uint8 (3, image_size, image_size): resize, crop the center.

    With side = round(image_size / crop_ratio), 256 for 224, these are timm's modes:
    `center` resizes the short side to it; `squash` both sides, whatever the shape of the image;
    `border` the long side, and fills up to the square.
    """

    image_size: int = 224
    crop_ratio: float = 0.875  # in (0, 1]
    interpolation: str = "bilinear"
    decoder: str = "auto"  # see `decode_rgb`
    crop_mode: str = "center"
    fill: tuple[int, ...] = (0, 0, 0)  # of a border, 0..255
    NUM_DRAWS: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_decoder(self.decoder)

    def __call__(self, data: bytes, draws: np.ndarray | None = None) -> torch.Tensor:
        pixels = decode_rgb(data, decoder=self.decoder)
        height, width = self.resized_size(*pixels.shape[:2])
        check_num_pixels(height, width)  # a strip of 1x60,000 would become 256x15,360,000
        image = resize(pixels, height, width, self.interpolation)
        if self.crop_mode == "border":
            image = self._with_border(image)
        height, width = image.shape[1:]
        top = round((height - self.image_size) / 2)
        left = round((width - self.image_size) / 2)
        return image[:, top : top + self.image_size, left : left + self.image_size]

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which an image of that size is resized."""
        side = round(self.image_size / self.crop_ratio)
        if self.crop_mode == "squash":
            return side, side
        if self.crop_mode == "border":
            ratio = max(height, width) / side
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        return resized_size(height, width, side)

    def _with_border(self, image: torch.Tensor) -> torch.Tensor:
        """The image in the middle of a square of the fill color, where it is smaller."""
        height, width = image.shape[1:]
        shape = max(height, self.image_size), max(width, self.image_size)
        if shape == (height, width):
            return image
        square = torch.empty((*shape, 3), dtype=torch.uint8)
        square[:] = torch.tensor(self.fill, dtype=torch.uint8)
        top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
        square[top : top + height, left : left + width] = image.permute(1, 2, 0)
        return square.permute(2, 0, 1)


def _adjust_color(image: torch.Tensor, factors: Mapping[str, float]) -> torch.Tensor:
    """Adjust what `factors` names, in its order.

    Equal to torchvision's adjust_brightness, _contrast and _saturation on uint8, which round down
    after each; the whole numbers between them are kept as float32.
    """
    image = image.float()
    for name, factor in factors.items():
        _ADJUSTMENTS[name](image, factor)
        image.clamp_(0, 255).floor_()
    return image.to(torch.uint8)


def _adjust_brightness_(image: torch.Tensor, factor: float) -> None:
    image.mul_(factor)


def _adjust_contrast_(image: torch.Tensor, factor: float) -> None:
    # A float64 sum of whole numbers is exact, so it is the same for any number of threads.
    mean = _gray(image).mean(dtype=torch.float64)
    image.mul_(factor).add_(mean.float(), alpha=1 - factor)


def _adjust_saturation_(image: torch.Tensor, factor: float) -> None:
    gray = _gray(image)
    image.mul_(factor).add_(gray, alpha=1 - factor)


# In the order of their draws.
_ADJUSTMENTS = {
    "brightness": _adjust_brightness_,
    "contrast": _adjust_contrast_,
    "saturation": _adjust_saturation_,
}


def _gray(image: torch.Tensor) -> torch.Tensor:
    """Luma, rounded down; float32 (H, W). The weights are torchvision's."""
    red, green, blue = image
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
