"""Contact sheets of classes, so that wrong labels meet the eye."""

import os
from contextlib import closing

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from wds_convnext.errors import DataError, UsageError
from wds_convnext.lettering import Lettering
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.reader import SampleReader

_CELL = 96  # pixels
_NAME_WIDTH = 180
_PER_CLASS = 10
_MAX_CLASSES = 100
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
    save_sheet(sheet, path)


def save_sheet(sheet: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG.

    Raises:
        UsageError: if the file cannot be written.
    """
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
