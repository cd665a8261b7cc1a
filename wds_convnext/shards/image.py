"""What encoded bytes are: the format, size and mode of an image, and whether it is whole.

Conversion, verify, inspect, training and evaluation all judge by this module, and take pixels from
`decode` on top of it: what one of them accepts, the others accept.
"""

import functools
import io
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

from PIL import Image, UnidentifiedImageError

from wds_convnext.shards.jpeg import has_jpeg_end, read_jpeg_header
from wds_convnext.shards.limits import (
    CONVERSION_LIMITS,
    MAX_BYTES,
    MAX_PIXELS,
    PILLOW_BYTES,
    WEBP_BYTES,
    ImageError,
    Limits,
)
from wds_convnext.shards.sniff import sniff

# Pillow's names of the formats, and the extension that a member with such an image gets. They are
# those that members of a shard may be named after (`tar.IMAGE_EXTENSIONS`). Others stay out: TIFF
# and PPM have no member to stand in, and EPS would be handed to Ghostscript.
# MPO is a JPEG with further pictures behind it, as 3-D cameras and phones write.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
_FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")  # Pillow opens it as a JPEG

_PNG_END = b"IEND\xae\x42\x60\x82"
_PLAIN_MODES = ("RGB", "L")
ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class ImageFacts:
    """What an image's header states. `unusual` names what a reader may trip over.

    `orientation` is EXIF's: 1 is upright, 2 to 8 are turned or mirrored.
    """

    extension: str
    mode: str
    width: int
    height: int
    unusual: tuple[str, ...]
    orientation: int = 1


def inspect_image(data: bytes | memoryview) -> ImageFacts:
    """Judge an encoded image by its header and its end: 5 us for a JPEG, 50 to 100 for others.

    Damage between the two is found by decoding alone (`decode.decode_rgb`).

    Raises:
        ImageError: why the image is unusable, in a few words.
    """
    if len(data) > MAX_BYTES:
        raise ImageError(f"too large: {len(data):,} bytes, the limit is {MAX_BYTES:,}")
    if (jpeg := read_jpeg_header(data)) is not None:
        orientation = 1 if jpeg.exif is None else _orientation(data[jpeg.exif])
        return _describe("jpg", jpeg.mode, jpeg.width, jpeg.height, orientation=orientation)
    with open_with_pillow(data) as image:
        return _describe(
            EXTENSIONS[str(image.format)],
            image.mode,
            *image.size,
            orientation=_orientation(image.info["exif"]) if "exif" in image.info else 1,
            is_animated=image.format != "MPO" and getattr(image, "is_animated", False),
        )


def _describe(
    extension: str,
    mode: str,
    width: int,
    height: int,
    *,
    orientation: int,
    is_animated: bool = False,
) -> ImageFacts:
    unusual: tuple[str, ...] = () if mode in _PLAIN_MODES else (f"mode {mode}",)
    if is_animated:
        unusual += ("animated",)
    if orientation != 1:
        unusual += ("EXIF-rotated",)
    return ImageFacts(extension, mode, width, height, unusual, orientation)


@contextmanager
def open_with_pillow(
    data: bytes | memoryview, limits: Limits = CONVERSION_LIMITS
) -> Iterator[Image.Image]:
    """An image as Pillow opens it, judged by its header and its end.

    Raises:
        ImageError: for whatever Pillow raises, here or in the body of the `with`.
    """
    if len(data) == 0:
        raise ImageError("empty")
    _silence_pillow()
    stream = io.BytesIO(data)
    try:
        with Image.open(stream, formats=_FORMATS) as image:
            num_bytes = WEBP_BYTES if image.format == "WEBP" else PILLOW_BYTES
            limits.check(image.height, image.width, num_bytes)
            _check_end(data, stream.tell(), EXTENSIONS[str(image.format)])
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        if other := sniff(data):
            raise ImageError(f"not an image that is read, but {other[0]}. {other[1]}") from None
        raise ImageError(f"not an image (begins with {bytes(data[:8])!r})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"too large: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # on damaged files Pillow's plugins raise nearly every type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"does not decode ({reason})") from error


def _check_end(data: bytes | memoryview, start: int, extension: str) -> None:
    """Raise ImageError if a file's end is missing. Bytes after it are common and harmless.

    Args:
        start: where the header ends; before it stands the end mark of a thumbnail.
    """
    if extension == "jpg":
        is_whole = has_jpeg_end(data, start)
    elif extension == "png":
        is_whole = data[-8:] == _PNG_END or bytes(data[start:]).rfind(_PNG_END) >= 0
    elif extension == "gif":
        is_whole = _has_gif_trailer(data)
    else:  # the header states how many bytes there are
        stated = data[4:8] if extension == "webp" else data[2:6]
        num_bytes = int.from_bytes(stated, "little") + (8 if extension == "webp" else 0)
        is_whole = num_bytes <= len(data)
    if not is_whole:
        raise ImageError(f"cut short: the end of the {extension} file is missing")


def _has_gif_trailer(data: bytes | memoryview) -> bool:
    """Whether the blocks of a GIF lead to its trailer; the mark alone, one byte, says nothing."""
    try:
        at = 13 + _gif_table_bytes(data[10])
        while (block := data[at]) != 0x3B:
            at += 1
            if block == 0x2C:  # a frame: size, color table, code size
                at += 10 + _gif_table_bytes(data[at + 8])
            elif block == 0x21:  # an extension: its label
                at += 1
            else:  # stray bytes between blocks, which Pillow passes over, too
                continue
            while num_bytes := data[at]:
                at += 1 + num_bytes
            at += 1
    except IndexError:
        return False
    return True


def _gif_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _orientation(exif: bytes | memoryview) -> int:
    """How EXIF says that the image is to be turned or mirrored. Broken EXIF says nothing: 1."""
    tags = Image.Exif()
    try:
        tags.load(bytes(exif))
        stated = tags.get(ORIENTATION, 1)
        return stated if stated in range(2, 9) else 1
    except Exception:  # struct.error and more: nobody needs the EXIF of an image to use it
        return 1


@functools.cache
def _silence_pillow() -> None:
    """Ignore Pillow's warnings from now on: odd metadata, sizes that we check ourselves.

    For good, because `warnings.catch_warnings` is not thread-safe, and because every change of
    the filters makes all "once" warnings of the process appear again.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass
class ImageSurvey:
    """What was found in many images; surveys add up."""

    formats: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    unusual: Counter = field(default_factory=Counter)
    short_sides: Counter = field(default_factory=Counter)
    long_sides: Counter = field(default_factory=Counter)

    def add(self, facts: ImageFacts) -> None:
        self.formats[facts.extension] += 1
        self.modes[facts.mode] += 1
        self.unusual.update(facts.unusual)
        self.short_sides[min(facts.width, facts.height)] += 1
        self.long_sides[max(facts.width, facts.height)] += 1

    def merge(self, counts: dict[str, list]) -> None:
        """Add what `to_json` gave of another survey."""
        for name, pairs in counts.items():
            for value, number in pairs:
                getattr(self, name)[value] += number

    def to_json(self) -> dict[str, list]:
        """Counts as lists of (value, number), sorted."""
        return {name: sorted(counter.items()) for name, counter in vars(self).items()}

    @property
    def median_side(self) -> int:
        """The median of the short sides, in pixels; there has to be one."""
        return _median(self.short_sides)

    def describe_sizes(self) -> str:
        """Smallest, median and largest of the sides, as text."""
        return "; ".join(
            f"{name} side {min(sides)} to {max(sides)}, median {_median(sides)}"
            for name, sides in (("short", self.short_sides), ("long", self.long_sides))
        )


def _median(counter: Counter) -> int:
    values = sorted(counter)
    below = accumulate(counter[value] for value in values)
    return next(value for value, num in zip(values, below) if 2 * num >= counter.total())
