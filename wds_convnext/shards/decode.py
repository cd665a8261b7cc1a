"""Encoded image bytes -> RGB pixels: simplejpeg for JPEG, Pillow for everything else.

Of an ordinary JPEG only the rows down to the lower edge of the wanted box are decoded: a smaller
height in the frame header makes libjpeg stop there, bit-exact on the rows used. That hides no
damage, see `_decode_jpeg`. Loader workers leave out the columns next to the box as well, where
nvImageCodec is installed (`boxdecoder`). All decoders are built on libjpeg-turbo and give the same
pixels of a sound image.

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

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import simplejpeg

from wds_convnext.errors import UsageError, did_you_mean
from wds_convnext.shards.boxdecoder import (
    PACKAGE,
    Box,
    BoxDecoder,
    box_decoder,
    is_installed,
)
from wds_convnext.shards.image import open_with_pillow
from wds_convnext.shards.jpeg import JpegHeader, bare_jpeg, read_jpeg_header
from wds_convnext.shards.limits import TRAINING_LIMITS, ImageError, Limits

# Upsampling chroma reads one chroma row below the box; 16 is the height of a 4:2:0 MCU.
_MARGIN_ROWS = 16

_LEFT_OVER = "extraneous bytes before marker 0xd9"
_DAMAGE = ("Corrupt JPEG data", "Premature end")

DECODERS = ("auto", "nvimgcodec", "simplejpeg", "pillow")
_MIN_PIXELS, _MIN_COLUMNS = 1 << 15, 8
# It takes more for each pixel: boxes of three quarters of the pixels that simplejpeg decodes take
# the same time with both, those of a third 0.83 of it, and of nine tenths 1.1 (500 photographs,
# lowest of 7 rounds). Choosing so gives 0.949 ms a crop where simplejpeg takes 1.071, nvImageCodec
# alone 0.952.
_MAX_SHARE = 0.75
_MAX_TOGETHER = 1 << 20  # pixels of boxes; 3 MB


ChooseBox = Callable[[int, int], Box]  # (height, width) of an image -> the box wanted


def check_decoder(decoder: str) -> None:
    """Refuse a decoder that is unknown or not installed.

    Raises:
        UsageError: if it is.
    """
    if decoder not in DECODERS:
        raise UsageError(
            f"decoder {decoder!r}: expected one of {', '.join(DECODERS)}."
            f"{did_you_mean(decoder, DECODERS)}"
        )
    if decoder == "nvimgcodec" and not is_installed():
        raise UsageError(
            f"decoder nvimgcodec: {PACKAGE} is not installed here. Install it, or use auto."
        )


def decoder_versions(decoder: str) -> str:
    """What makes the pixels, with versions, as checkpoints note it."""
    packages = {"nvimgcodec": PACKAGE, "simplejpeg": "simplejpeg", "pillow": "pillow"}
    if decoder in ("simplejpeg", "pillow") or not is_installed():
        del packages["nvimgcodec"]
    if decoder == "pillow":
        del packages["simplejpeg"]
    return ", ".join(f"{n} {importlib.metadata.version(p)}" for n, p in packages.items())


def whole_image(height: int, width: int) -> Box:
    return Box(0, 0, height, width)


def decode_rgb(
    data: bytes,
    choose_box: ChooseBox = whole_image,
    *,
    limits: Limits = TRAINING_LIMITS,
    decoder: str = "simplejpeg",
) -> np.ndarray:
    """The RGB pixels of an encoded image, or of a box in it.

    They are those of Pillow's `convert("RGB")`: alpha is dropped, not composited; of an animation
    the first frame; EXIF orientation is ignored, as in torchvision, timm and webdataset, because
    ImageNet's published accuracies are made so. One exception: 16-bit gray is reduced to its high
    byte, as Pillow itself does for 16-bit RGB; `convert` would clip it to white.

    Args:
        choose_box: maps (height, width) of the image to the box wanted.
        limits: of the memory and time that decoding may take.
        decoder: of JPEGs. `simplejpeg` is strict, and what `auto` stands for here. `nvimgcodec`
            gives way to it where it is not faster, and where it says anything about an image; it
            stops at the lower edge of the box, so it sees less damage, and it keeps from the user
            what the process writes to stderr meanwhile. `pillow` lets damage pass that libjpeg
            merely warns of.
    Returns:
        uint8 (height, width, 3), possibly a view into a larger array.
    Raises:
        ImageError: what `inspect_image` refuses, or what is damaged in the rows decoded.
    """
    data, jpeg = (data, None) if decoder == "pillow" else _simple_jpeg(data, limits)
    if jpeg is not None:
        box = choose_box(jpeg.height, jpeg.width)
        if decoder == "nvimgcodec" and _is_for_box_decoder(jpeg, box):
            (pixels,) = _working_box_decoder().decode([bytes(data)], [box])
            if pixels is not None:
                return pixels
        pixels = _decode_jpeg(data, jpeg, box)
        if pixels is not None:
            return pixels
    pixels = _decode_with_pillow(data, limits)
    box = choose_box(*pixels.shape[:2])
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def decode_boxes(
    images: Sequence[bytes],
    box_choices: Sequence[ChooseBox],
    *,
    limits: Limits = TRAINING_LIMITS,
) -> list[np.ndarray | None]:
    """A box of each image as `decode_rgb` with `nvimgcodec` gives it, together in less time.

    None for what is left to `decode_rgb`: images that it may refuse, formats other than JPEG, and
    boxes of more pixels than are to be in memory together.
    """
    found: list[np.ndarray | None] = [None] * len(images)
    jpegs: dict[int, tuple[bytes, Box]] = {}
    num_pixels = 0
    for i, (data, choose_box) in enumerate(zip(images, box_choices, strict=True)):
        with suppress(ImageError):
            data, jpeg = _simple_jpeg(data, limits)
            if jpeg is None:
                continue
            box = choose_box(jpeg.height, jpeg.width)
            num_pixels += box.height * box.width
            if num_pixels > _MAX_TOGETHER:
                break
            if _is_for_box_decoder(jpeg, box):
                jpegs[i] = bytes(data), box
            else:
                found[i] = _decode_jpeg(data, jpeg, box)
    if jpegs:
        for i, pixels in zip(jpegs, _working_box_decoder().decode(*zip(*jpegs.values()))):
            found[i] = pixels
    return found


def decode_reduced(data: bytes, factor: int, *, limits: Limits = TRAINING_LIMITS) -> np.ndarray:
    """All pixels, as `decode_rgb` gives them; those of a JPEG at 1/factor of its sides.

    libjpeg leaves out the high frequencies of each block (scaled DCT): a third of the time of
    decoding and shrinking photographs of 12 megapixels. An image shrunk from there to half its
    sides or less is like one shrunk from all pixels (PSNR 52 to 56 dB).

    Args:
        factor: 1, 2, 4 or 8. Formats other than JPEG, and CMYK, come at full size.
    Returns:
        uint8 (height, width, 3); the sides of a reduced JPEG are rounded up.
    Raises:
        ImageError: as `decode_rgb`.
    """
    plain, jpeg = _simple_jpeg(data, limits)
    if jpeg is None or factor == 1:
        return decode_rgb(data, limits=limits)
    shape = (-(-jpeg.height // factor), -(-jpeg.width // factor), 3)
    pixels = _decode_into(np.empty(shape, np.uint8), plain, is_reduced=True)
    return decode_rgb(data, limits=limits) if pixels is None else pixels


def _simple_jpeg(data: bytes, limits: Limits) -> tuple[bytes, JpegHeader | None]:
    """A JPEG as simplejpeg takes it, and its header; the header is None for what is Pillow's."""
    jpeg = read_jpeg_header(data, limits)
    if jpeg is not None and not jpeg.is_plain:
        data = bare_jpeg(data)
        jpeg = read_jpeg_header(data, limits)
    return data, None if jpeg is None or jpeg.mode == "CMYK" else jpeg


def _is_for_box_decoder(jpeg: JpegHeader, box: Box) -> bool:
    """Whether nvImageCodec is to decode this box.

    Of several scans it would have to keep all; libjpeg then smooths what is left of a box
    otherwise, and boxes of one column lose the smooth upsampling.
    """
    if not jpeg.is_one_run or jpeg.height * jpeg.width < _MIN_PIXELS or box.width < _MIN_COLUMNS:
        return False
    num_rows = min(jpeg.height, box.top + box.height + _MARGIN_ROWS)
    return box.height * box.width <= _MAX_SHARE * num_rows * jpeg.width


def _working_box_decoder() -> BoxDecoder:
    if (decoder := box_decoder()) is None:
        raise UsageError(f"decoder nvimgcodec: {PACKAGE} does not work here. Use auto.")
    return decoder


def _decode_jpeg(data: bytes | bytearray, header: JpegHeader, box: Box) -> np.ndarray | None:
    """The pixels of a box, or None for a JPEG that simplejpeg does not take."""
    height, last = header.height, box.top + box.height
    if header.is_one_run and last + _MARGIN_ROWS < height:
        height = last + _MARGIN_ROWS
        data = bytearray(data)
        data[header.height_at : header.height_at + 2] = height.to_bytes(2, "big")
    pixels = _decode_into(np.empty((height, header.width, 3), dtype=np.uint8), data)
    return None if pixels is None else pixels[box.top : last, box.left : box.left + box.width]


def _decode_into(
    pixels_HWC: np.ndarray, data: bytes | bytearray, *, is_reduced: bool = False
) -> np.ndarray | None:
    """An array of a JPEG's size, or reduced, filled; None for what simplejpeg does not take."""
    height, width, _ = pixels_HWC.shape
    # libjpeg takes the least scale that gives so many rows and columns. Not asked for where all are
    # wanted: 7/8 of 3 pixels are 3 again, but others.
    scale = {"min_height": height, "min_width": width} if is_reduced else {}
    complaint = _fill(pixels_HWC, data, **scale)
    if complaint and not complaint.endswith(_LEFT_OVER):
        # libjpeg reports its first warning only, and that may be about metadata or stray bytes.
        complaint = _fill(pixels_HWC, bare_jpeg(data), **scale)
    # Bytes left over before the end of the image mean that all rows asked for were there; any
    # other complaint about the data means rows of gray or noise.
    if complaint.startswith(_DAMAGE) and not complaint.endswith(_LEFT_OVER):
        raise ImageError(f"does not decode ({complaint})")
    return None if complaint and not complaint.endswith(_LEFT_OVER) else pixels_HWC


def _fill(pixels_HWC: np.ndarray, data: bytes | bytearray, **scale: int) -> str:
    """Decode a JPEG into an array of its size, or reduced; libjpeg's complaint, or ""."""
    try:
        found = simplejpeg.decode_jpeg(data, buffer=pixels_HWC, **scale)
    except ValueError as error:  # after a warning the array is filled all the same
        return str(error)
    # The size is read here and by libjpeg; where they differ, pixels would be memory as it was.
    if found.shape != pixels_HWC.shape:
        raise ImageError(
            f"does not decode (libjpeg finds {found.shape[1]} x {found.shape[0]} pixels)"
        )
    return ""


def _decode_with_pillow(data: bytes, limits: Limits) -> np.ndarray:
    with open_with_pillow(data, limits) as image:
        if image.mode.startswith("I;16"):
            high_byte_HW = (np.asarray(image) >> 8).astype(np.uint8)
            return np.stack([high_byte_HW] * 3, axis=-1)
        return np.array(image.convert("RGB"))
