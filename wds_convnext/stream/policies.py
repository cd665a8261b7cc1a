"""Augmentation policies of the field: operations on the finished crop, chosen by keyed draws.

Operations, their magnitudes and their pixels are torchvision's (v2, bilinear, black outside),
given the draws. What they cost stands in docs/benchmarks.md.
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from wds_convnext.config.fields import RAND_AUGMENT
from wds_convnext.errors import UsageError

_NUM_BINS = 31  # magnitudes of an operation, as in torchvision: 0 is none of it, 30 the most
Operations = list[tuple[str, float]]  # names and magnitudes, in the order they are applied in


class Policy(Protocol):
    """Which operations an image gets."""

    @property
    def NUM_DRAWS(self) -> int: ...

    def choose(self, draws: np.ndarray, image_size: int) -> Operations:
        """The operations for uniform draws in [0, 1), float64 (NUM_DRAWS,)."""


@dataclass(frozen=True)
class TrivialAugment:
    """One operation, its magnitude uniform.

    Source: Müller and Hutter 2021, arXiv:2103.10158, in its wide space.
    """

    NUM_DRAWS: ClassVar[int] = 3  # operation, magnitude, sign

    def choose(self, draws: np.ndarray, image_size: int) -> Operations:
        operation, magnitude, sign = draws.tolist()
        highest = _WIDE | {"TranslateX": 32.0, "TranslateY": 32.0, "Posterize": 6.0}
        return [_pick(highest, operation, int(magnitude * _NUM_BINS), sign)]


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` operations, all of one magnitude.

    Source: Cubuk et al. 2019, arXiv:1909.13719.

    Args:
        magnitude: 0 (nothing) to 30.
        num_ops: at least 1.
    """

    magnitude: int = 9
    num_ops: int = 2

    @property
    def NUM_DRAWS(self) -> int:
        return 2 * self.num_ops  # operation and sign of each

    def choose(self, draws: np.ndarray, image_size: int) -> Operations:
        way = 150.0 / 331.0 * image_size
        highest = _NARROW | {"TranslateX": way, "TranslateY": way, "Posterize": 4.0}
        return [
            _pick(highest, operation, self.magnitude, sign)
            for operation, sign in draws.reshape(-1, 2).tolist()
        ]


@dataclass(frozen=True)
class ThreeAugment:
    """One of gray, solarize and blur. DeiT III adds color jitter of 0.3 and a simple crop.

    Source: Touvron et al. 2022, arXiv:2204.07118. The blur is Gaussian with a standard deviation
    of 0.1 to 2 pixels, in a kernel of three deviations to each side.
    """

    NUM_DRAWS: ClassVar[int] = 2  # operation, deviation

    def choose(self, draws: np.ndarray, image_size: int) -> Operations:
        operation, deviation = draws.tolist()
        magnitudes = {"Gray": 0.0, "Solarize": 128 / 255, "Blur": 0.1 + 1.9 * deviation}
        return [[*magnitudes.items()][int(operation * len(magnitudes))]]


def parse_policy(text: str) -> Policy | None:
    """The policy of `none`, `trivial`, `3a`, `rand` or timm's `rand-m9-n2`.

    Raises:
        UsageError: if it is none of these.
    """
    if text == "none":
        return None
    if text == "trivial":
        return TrivialAugment()
    if text == "3a":
        return ThreeAugment()
    match = RAND_AUGMENT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--auto-augment {text}: expected none, trivial, 3a, rand or rand-m9-n2: magnitude 0 "
            "to 30, 1 to 9 operations."
        )
    return RandAugment(int(match[1] or 9), int(match[2] or 2))


@cache
def functional() -> Any:
    """torchvision's operations. The import takes a second; before workers are forked, once."""
    return importlib.import_module("torchvision.transforms.v2.functional")


# The highest magnitude of each operation; None where it has none. Order matters: it is drawn from.
_WIDE: dict[str, float | None] = {
    "Identity": None,
    "ShearX": 0.99,
    "ShearY": 0.99,
    "TranslateX": None,  # these and Posterize depend on the policy
    "TranslateY": None,
    "Rotate": 135.0,
    "Brightness": 0.99,
    "Color": 0.99,
    "Contrast": 0.99,
    "Sharpness": 0.99,
    "Posterize": None,
    "Solarize": 1.0,
    "AutoContrast": None,
    "Equalize": None,
}
_NARROW: dict[str, float | None] = _WIDE | {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}


def _pick(
    highest: Mapping[str, float | None], operation: float, bin: int, sign: float
) -> tuple[str, float]:
    """The operation that a draw names, with the magnitude of a bin."""
    name, most = [*highest.items()][int(operation * len(highest))]
    if most is None:
        return name, 0.0
    if name == "Posterize":  # bits that stay; half is rounded to even, as torch does
        return name, float(8 - round(bin / ((_NUM_BINS - 1) / most)))
    if name == "Solarize":  # the lower the threshold, the stronger
        return name, _magnitudes(1.0, 0.0)[bin]
    magnitude = _magnitudes(0.0, most)[bin]
    return name, -magnitude if sign <= 0.5 else magnitude


@lru_cache(maxsize=64)
def _magnitudes(first: float, last: float) -> list[float]:
    return torch.linspace(first, last, _NUM_BINS).tolist()


def apply(image: torch.Tensor, operations: Operations) -> torch.Tensor:
    """An image after operations; uint8 (3, H, W)."""
    for name, magnitude in operations:
        image = _apply(image, name, magnitude)
    return image


def _apply(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    F = functional()

    if name in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
        return _affine(image, name, magnitude)
    operations = {
        "Identity": lambda: image,
        "Rotate": lambda: F.rotate(image, magnitude, interpolation=F.InterpolationMode.BILINEAR),
        "Brightness": lambda: F.adjust_brightness(image, 1 + magnitude),
        "Color": lambda: F.adjust_saturation(image, 1 + magnitude),
        "Contrast": lambda: F.adjust_contrast(image, 1 + magnitude),
        "Sharpness": lambda: F.adjust_sharpness(image, 1 + magnitude),
        "Posterize": lambda: F.posterize(image, int(magnitude)),
        "Solarize": lambda: F.solarize(image, 255 * magnitude),
        "AutoContrast": lambda: F.autocontrast(image),
        "Equalize": lambda: F.equalize(image),
        "Gray": lambda: F.rgb_to_grayscale(image, num_output_channels=3),
        "Blur": lambda: F.gaussian_blur(image, 2 * math.ceil(3 * magnitude) + 1, magnitude),
    }
    return operations[name]()


def _affine(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    F = functional()

    along_x = name.endswith("X")
    shear, way = [0.0, 0.0], [0, 0]
    center = None
    if name.startswith("Shear"):
        shear[not along_x] = math.degrees(math.atan(magnitude))
        center = [0.0, 0.0]
    else:
        way[not along_x] = int(magnitude)
    return F.affine(
        image,
        angle=0.0,
        translate=way,
        scale=1.0,
        shear=shear,
        interpolation=F.InterpolationMode.BILINEAR,
        center=center,
    )
