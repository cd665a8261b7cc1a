"""Sheets of a step's batches as the model sees them, with what each picture's label is made of."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from wds_convnext.lettering import Lettering
from wds_convnext.training.augment import MixDraw

_CELL = 96  # pixels
_MAX_PIXELS = 48_000_000  # of the pictures of a step
_MAX_SIDE = 224  # of one of them
_LINE = 16
_BACKGROUND, _INK = "white", "black"


class BatchSheet:
    """A sheet of batches of one size, each under a title, with two lines under each picture.

    All pictures are on it, pixel by pixel or each pixel as a square. Those over 224 pixels are
    made smaller, and those of a large step, so that it takes at most 150 MB.

    Args:
        image_size: of the pictures that are added, in pixels.
    """

    def __init__(self, *, num_batches: int, batch_size: int, image_size: int):
        self.columns = min(batch_size, max(10, math.isqrt(num_batches * batch_size)))
        rows = num_batches * -(-batch_size // self.columns)
        most = min(_MAX_SIDE, math.isqrt(_MAX_PIXELS // (rows * self.columns)))
        self.side = min(most, image_size * -(-_CELL // image_size))
        self.lettering = Lettering(_LINE - 3)
        self.cell = self.side + 2, self.side + 2 * _LINE  # width, height
        self.block = _LINE + rows // num_batches * self.cell[1]  # height of a batch
        size = self.columns * self.cell[0], num_batches * self.block
        self.image = Image.new("RGB", size, _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.num_added = 0

    def add(self, title: str, images: torch.Tensor, captions: Sequence[tuple[str, str]]) -> None:
        """Draw the next batch: uint8 (B, 3, S, S), with its title and each picture's lines."""
        (width, height), top = self.cell, self.num_added * self.block
        self.num_added += 1
        self._write(title, 0, top, self.image.width)
        for i, (pixels, lines) in enumerate(zip(images, captions)):
            row, column = divmod(i, self.columns)
            left, upper = column * width, top + _LINE + row * height
            picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            enlarges = self.side > picture.width
            how = Image.Resampling.NEAREST if enlarges else Image.Resampling.BOX
            self.image.paste(picture.resize((self.side, self.side), how), (left, upper))
            for number, line in enumerate(lines):
                self._write(line, left, upper + self.side + number * _LINE, width)

    def _write(self, text: str, left: int, top: int, width: int) -> None:
        text, font = self.lettering.fit(text, width - 4)
        self.draw.text((left + 2, top + _LINE // 2), text, _INK, font, anchor="lm")


def captions(class_names: Sequence[str], mix: MixDraw) -> list[tuple[str, str]]:
    """Under each picture of a batch its class; where it is mixed, both classes and their weights.

    Args:
        class_names: of all samples of the batch: the partner of the first is the last.
    """
    if mix.share == 1:
        return [(name, "") for name in class_names]
    return [
        (f"{mix.share:.0%} {own}", f"{1 - mix.share:.0%} {partner}")
        for own, partner in zip(class_names, reversed(class_names))
    ]
