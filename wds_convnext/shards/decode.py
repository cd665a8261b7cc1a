"""Encoded image bytes -> RGB pixels: simplejpeg for JPEG, Pillow for everything else.

Of an ordinary JPEG only the rows down to the lower edge of the wanted box are decoded: a smaller
height in the frame header makes libjpeg stop there, bit-exact on the rows used. That hides no
damage, see `_decode_jpeg`.

CPU ms per image, one core, 500 ImageNet photographs (0.2 megapixels, 110 kB on average), medians
of interleaved rounds: the rows of a random crop 1.03, all rows 1.15. Tried and lost:
- Scaled decoding (1/2, 1/4, 1/8) where a crop is at least twice the output: photographs of 12
  megapixels take 21.8 ms instead of 35.5 with the resize, but pixels differ by up to 57 of 255.
- Cutting the entropy-coded bytes where the last row should end: no gain, libjpeg skips the rest
  at no cost.
- One output buffer per thread, used again: no gain with malloc's defaults. 0.12 ms where
  M_MMAP_THRESHOLD or M_TRIM_THRESHOLD is set (either one freezes the other at 128 KiB, so that
  every image is paid for in page faults: 0.3 ms with the resize); set both, or none.
"""

import functools
import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from wds_convnext.errors import DataError

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses an image as a decompression bomb

# Formats of photographs. Pillow's others include EPS, which it hands to Ghostscript.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# JPEG markers (ITU-T T.81, table B.1): a byte 0xFF, then one of these.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_HUFFMAN = (0xC0, 0xC1)
_START_OF_SCAN = 0xDA
_RESTART_INTERVAL = 0xDD
_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"

# Upsampling chroma reads one chroma row below the box; 16 is the height of a 4:2:0 MCU.
_MARGIN_ROWS = 16


class ImageError(DataError):
    """The bytes are not one whole image of bounded size; the message says what was found."""


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def whole_image(height: int, width: int) -> Box:
    return Box(0, 0, height, width)


def decode_rgb(data: bytes, choose_box: Callable[[int, int], Box] = whole_image) -> np.ndarray:
    """The RGB pixels of an encoded image, or of a box in it.

    They are those of Pillow's `convert("RGB")`: alpha is dropped, not composited; of an animation
    the first frame; EXIF orientation is ignored, as in torchvision, timm and webdataset, because
    ImageNet's published accuracies are made so. One exception: 16-bit grey is reduced to its high
    byte, as Pillow itself does for 16-bit RGB; `convert` would clip it to white.

    Args:
        choose_box: maps (height, width) of the image to the box wanted.
    Returns:
        uint8 (height, width, 3), possibly a view into a larger array.
    Raises:
        ImageError: not an image, cut short, damaged in the rows decoded, or over MAX_PIXELS.
    """
    pixels = None
    if (jpeg := _read_jpeg_header(data)) is not None:
        check_num_pixels(jpeg.height, jpeg.width)
        if data.rfind(_END_OF_IMAGE, jpeg.scan_at) < 0:
            raise ImageError(f"JPEG cut short: no end-of-image marker in its {len(data)} bytes")
        if jpeg.is_grey_or_colour:
            box = choose_box(jpeg.height, jpeg.width)
            pixels = _decode_jpeg(data, jpeg, box.top + box.height)
    if pixels is None:
        pixels = _decode_with_pillow(data)
        box = choose_box(*pixels.shape[:2])
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def check_num_pixels(height: int, width: int) -> None:
    """Raise ImageError if an image of this size would have more than MAX_PIXELS pixels."""
    if height * width > MAX_PIXELS:
        raise ImageError(f"image of {width}x{height} pixels is over the limit of {MAX_PIXELS:,}")


@dataclass(frozen=True)
class _JpegHeader:
    height: int
    width: int
    height_at: int  # offset of the two bytes that hold the height
    scan_at: int  # offset of the first scan
    is_grey_or_colour: bool  # 8 bits, one or three components: not CMYK
    is_one_run: bool  # sequential Huffman code, one scan, no restart markers


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """What the segments before the first scan say, or None if they are not a JPEG's."""
    if not data.startswith(_START_OF_IMAGE):
        return None
    frame_at, has_restarts, at = None, False, 2
    try:
        while (marker := data[at + 1]) != _START_OF_SCAN:
            if data[at] != 0xFF:
                return None
            if marker in _START_OF_FRAME:
                frame_at, frame_marker = at, marker
            has_restarts |= marker == _RESTART_INTERVAL
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        if frame_at is None:
            return None
        bits, height, width, num_components = struct.unpack_from(">BHHB", data, frame_at + 4)
        num_scanned = data[at + 4]
    except (IndexError, struct.error):  # the bytes end in the header
        return None
    return _JpegHeader(
        height=height,
        width=width,
        height_at=frame_at + 5,
        scan_at=at,
        is_grey_or_colour=bits == 8 and num_components in (1, 3) and height > 0 and width > 0,
        is_one_run=(
            frame_marker in _SEQUENTIAL_HUFFMAN
            and num_scanned == num_components
            and not has_restarts
        ),
    )


def _decode_jpeg(data: bytes, header: _JpegHeader, num_rows: int) -> np.ndarray | None:
    """At least the first num_rows rows, or None for a JPEG that simplejpeg does not take."""
    height = header.height
    if header.is_one_run and num_rows + _MARGIN_ROWS < height:
        height = num_rows + _MARGIN_ROWS
        data = bytearray(data)
        data[header.height_at : header.height_at + 2] = height.to_bytes(2, "big")
    pixels_HWC = np.empty((height, header.width, 3), dtype=np.uint8)
    try:
        simplejpeg.decode_jpeg(data, buffer=pixels_HWC)
    except ValueError as error:
        # libjpeg fills the buffer to the end and then reports its first warning. Bytes left over
        # before the end of the image mean that all rows asked for were there; any other
        # complaint about the data means rows of grey or noise.
        message = str(error)
        if message.endswith("extraneous bytes before marker 0xd9"):
            return pixels_HWC
        if message.startswith(("Corrupt JPEG data", "Premature end")):
            raise ImageError(f"JPEG of {len(data)} bytes: {message}") from None
        return None
    return pixels_HWC


def _decode_with_pillow(data: bytes) -> np.ndarray:
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            check_num_pixels(image.height, image.width)
            if image.mode.startswith("I;16"):
                high_byte_HW = (np.asarray(image) >> 8).astype(np.uint8)
                return np.stack([high_byte_HW] * 3, axis=-1)
            return np.array(image.convert("RGB"))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image: {len(data)} bytes that begin {data[:8]!r}") from None
    except Exception as error:  # on damaged files Pillow's plugins raise nearly every type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image of {len(data)} bytes does not decode: {reason}") from error


@functools.cache
def _silence_pillow() -> None:
    """Ignore Pillow's warnings from now on: odd metadata, sizes that we check ourselves.

    For good, because `warnings.catch_warnings` is not thread-safe, and because every change of
    the filters makes all "once" warnings of the process appear again.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
