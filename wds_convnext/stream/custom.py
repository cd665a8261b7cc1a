"""What a transform is, and any function of a sample's bytes as one."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from wds_convnext.errors import DataError, UsageError


@runtime_checkable
class Transform(Protocol):
    """Encoded bytes and uniform draws in [0, 1) -> uint8 (3, image_size, image_size)."""

    @property
    def image_size(self) -> int: ...

    @property
    def NUM_DRAWS(self) -> int: ...

    def __call__(self, data: bytes, draws: np.ndarray) -> torch.Tensor: ...


class CustomTransform:
    """A function of encoded bytes that gives an image as a tensor or array (C, H, W).

    All images have one shape and dtype. A function that draws from the global generators of torch
    (as torchvision's transforms do), numpy or Python's `random` finds them seeded from the sample's
    own draws, so that its images do not depend on workers or resumes either; afterwards they are
    as they were.
    """

    NUM_DRAWS: ClassVar[int] = 1

    def __init__(self, function: Callable[[bytes], torch.Tensor | np.ndarray]):
        self.function = function

    def __call__(self, data: bytes, draws: np.ndarray) -> torch.Tensor:
        """The function's image.

        Raises:
            DataError: where the function raises OSError, as Pillow does for what is no image.
            UsageError: if it gives something else than an image of three dimensions.
        """
        with _seeded(int(draws[0] * 2**53)):
            try:
                image = self.function(data)
            except OSError as error:
                raise DataError(f"the transform does not take it ({error}).") from None
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image)
        if not isinstance(image, torch.Tensor) or image.ndim != 3:
            found = (
                f"a tensor {tuple(image.shape)}"
                if torch.is_tensor(image)
                else f"a {type(image).__name__}"
            )
            raise UsageError(f"the transform gives {found}: expected a tensor (C, H, W).")
        return image


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators seeded; afterwards they are as they were before."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's, too
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
