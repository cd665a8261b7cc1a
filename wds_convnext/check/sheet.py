"""Contact sheets: of classes, so that wrong labels meet the eye, and of a step's batches."""

import math
import os
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from wds_convnext.check.lettering import Lettering
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.reader import SampleReader

if TYPE_CHECKING:
    import torch

_CELL = 96  # pixels
_NAME_WIDTH = 180
_PER_CLASS = 10
_MAX_CLASSES = 100
_MAX_PIXELS = 48_000_000  # of the pictures of a step
_MAX_SIDE = 224  # of one of them
_LINE = 16
_BACKGROUND, _INK, _UNUSABLE = "white", "black", "firebrick"


def draw_sheet(dataset: Dataset, path: str | os.PathLike) -> None:
    """Write a PNG of up to 10 pictures of each of up to 100 classes, both spread evenly.

    A picture that does not decode is a red square.

    Raises:
        UsageError: if the file cannot be written.
    """
    classes = _spread(np.arange(dataset.num_classes), _MAX_CLASSES)
    width = _NAME_WIDTH + _PER_CLASS * _CELL
    sheet = Image.new("RGB", (width, max(1, len(classes)) * _CELL), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    lettering = Lettering(14)
    with closing(SampleReader(dataset)) as reader:
        for row, label in enumerate(classes.tolist()):
            name, font = lettering.fit(dataset.class_names[label], _NAME_WIDTH - 8)
            draw.text((4, row * _CELL + _CELL // 2), name, _INK, font, anchor="lm")
            numbers = _spread(np.flatnonzero(dataset.labels == label), _PER_CLASS)
            for column, number in enumerate(numbers.tolist()):
                corner = _NAME_WIDTH + column * _CELL, row * _CELL
                sheet.paste(_thumbnail(reader, number), corner)
    _save(sheet, path)


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

    def add(self, title: str, images: "torch.Tensor", captions: Sequence[tuple[str, str]]) -> None:
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

    def save(self, path: str | os.PathLike) -> None:
        """Write the PNG.

        Raises:
            UsageError: if the file cannot be written.
        """
        _save(self.image, path)

    def _write(self, text: str, left: int, top: int, width: int) -> None:
        text, font = self.lettering.fit(text, width - 4)
        self.draw.text((left + 2, top + _LINE // 2), text, _INK, font, anchor="lm")


def _save(sheet: Image.Image, path: str | os.PathLike) -> None:
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UsageError(f"--sheet {path}: {error.strerror or error}.") from None


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the values, evenly spread."""
    return values[np.arange(min(most, len(values))) * len(values) // max(1, min(most, len(values)))]


def _thumbnail(reader: SampleReader, number: int) -> Image.Image:
    try:
        image, _ = reader.read(number)
        picture = Image.fromarray(np.ascontiguousarray(decode_rgb(image)))
    except DataError:
        return Image.new("RGB", (_CELL, _CELL), _UNUSABLE)
    return ImageOps.pad(picture, (_CELL, _CELL), color=_BACKGROUND)
