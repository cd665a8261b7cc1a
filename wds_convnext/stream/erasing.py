"""Which rectangle of an image random erasing replaces: timm's choice, given the draws."""

import math

import numpy as np

from wds_convnext.shards.decode import Box

_ATTEMPTS = 10
NUM_DRAWS = 2 * _ATTEMPTS + 4
_AREA, _LOG_ASPECT = (0.02, 1 / 3), (math.log(0.3), math.log(1 / 0.3))


def erased_box(draws: np.ndarray, image_size: int, *, probability: float) -> Box | None:
    """The box that is replaced by noise, or None.

    Args:
        draws: uniform in [0, 1), float64 (NUM_DRAWS,): whether, (area, aspect) for each of ten
            attempts, top, left, and the key of the noise.
    Source: Zhong et al. 2017, arXiv:1708.04896; RandomErasing of timm.
    """
    whether, *attempts, top, left, _ = draws.tolist()
    if whether >= probability:
        return None
    for area_draw, aspect_draw in zip(attempts[::2], attempts[1::2], strict=True):
        area = image_size**2 * (_AREA[0] + area_draw * (_AREA[1] - _AREA[0]))
        aspect = math.exp(_LOG_ASPECT[0] + aspect_draw * (_LOG_ASPECT[1] - _LOG_ASPECT[0]))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < image_size and width < image_size:
            return Box(
                top=int(top * (image_size - height + 1)),
                left=int(left * (image_size - width + 1)),
                height=height,
                width=width,
            )
    return None


def erasure(draws: np.ndarray, image_size: int, *, probability: float) -> np.ndarray:
    """Box and key of the noise, as they go to the device: int64 (5,); a box of zeros for none."""
    box = erased_box(draws, image_size, probability=probability) or Box(0, 0, 0, 0)
    return np.array([*box, int(draws[-1] * 2**53)], dtype=np.int64)
