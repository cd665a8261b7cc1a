"""Where a crop lies, and pixels in another size: torchvision's arithmetic, given the draws."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from wds_convnext.shards.decode import Box

PADDING_MODES = ("constant", "reflect")


def random_crop_box(
    draws: Sequence[float],
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """The box that torchvision's RandomResizedCrop.get_params makes from the same numbers.

    Args:
        draws: (area, ratio) for each attempt, then top, left; uniform in [0, 1).
        scale: range of the box's share of the image's area.
        ratio: range of width / height; drawn log-uniformly.
    """
    *attempts, top, left = draws
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in zip(attempts[::2], attempts[1::2], strict=True):
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(log_low + ratio_draw * (log_high - log_low))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return Box(
                top=int(top * (height - box_height + 1)),
                left=int(left * (width - box_width + 1)),
                height=box_height,
                width=box_width,
            )
    box_height, box_width = height, width
    if width / height < min(ratio):
        box_height = round(width / min(ratio))
    elif width / height > max(ratio):
        box_width = round(height * max(ratio))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) of torchvision's Resize(short_side)."""
    if width <= height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def resize(pixels_HWC: np.ndarray, height: int, width: int, mode: str) -> torch.Tensor:
    """Antialiased; uint8 (3, height, width), a pixel's three bytes side by side."""
    pixels_1CHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    interpolate = partial(torch.nn.functional.interpolate, mode=mode, antialias=True)
    if mode == "bicubic":
        # It overshoots, and is clipped between its passes over columns and rows, so their order
        # shows (by 14 of 255 on photographs). torch resizes the width first; Pillow 13 the height
        # where this holds, as 2,954 of 2,954 random shapes showed.
        old_height, old_width = pixels_HWC.shape[:2]
        if height < old_height and 2 * (old_width - width) < old_height - height:
            pixels_1CHW = interpolate(pixels_1CHW, size=(height, old_width))
    return interpolate(pixels_1CHW, size=(height, width))[0]


def cut_out(image: torch.Tensor, box: Box, *, padding_mode: str) -> torch.Tensor:
    """A box of an image (3, H, W), where it is outside, of what pads the image.

    With `constant` that is black, with `reflect` the image mirrored at its outermost pixels; the
    box then may be outside by less than the image's sides.
    """
    height, width = image.shape[1:]
    rows = np.arange(box.top, box.top + box.height)
    columns = np.arange(box.left, box.left + box.width)
    pixels_HWC = image.permute(1, 2, 0).numpy()
    if padding_mode == "reflect":
        rows, columns = _reflected(rows, height), _reflected(columns, width)
        return torch.from_numpy(pixels_HWC[rows[:, None], columns]).permute(2, 0, 1)
    cut_HWC = np.zeros((box.height, box.width, 3), dtype=np.uint8)
    inside = np.ix_((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    cut_HWC[inside] = pixels_HWC[max(0, box.top) : rows[-1] + 1, max(0, box.left) : columns[-1] + 1]
    return torch.from_numpy(cut_HWC).permute(2, 0, 1)


def _reflected(places: np.ndarray, side: int) -> np.ndarray:
    places = np.abs(places)
    return np.minimum(places, 2 * (side - 1) - places)
