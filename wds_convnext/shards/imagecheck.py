"""What an encoded image is, by its content: format, size, mode, and whether it is whole."""

import io
import struct
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

from PIL import Image, UnidentifiedImageError

from wds_convnext.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow refuses to decode more (twice Image.MAX_IMAGE_PIXELS)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# MPO is a JPEG with further pictures behind it, as 3-D cameras and phones write.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
_END_MARKS = {"jpg": b"\xff\xd9", "png": b"IEND\xae\x42\x60\x82"}
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_PLAIN_MODES = ("RGB", "L")
_SCAN, _APP1, _FRAMES = 0xDA, 0xE1, (0xC0, 0xC1, 0xC2)  # JPEG markers; frames that all read
_FRAME = struct.Struct(">BHHB")
_JPEG_MODES = {(8, 1): "L", (8, 3): "RGB", (8, 4): "CMYK"}  # by precision and channels


@dataclass(frozen=True)
class ImageFacts:
    """What an image's header states. `unusual` names what a reader may trip over."""

    extension: str
    mode: str
    width: int
    height: int
    unusual: tuple[str, ...]


def inspect_image(data, *, decode: bool = False) -> ImageFacts:
    """Recognise an encoded image and check that it is whole.

    Args:
        data: the encoded bytes, or a memoryview of them.
        decode: decode every pixel, instead of reading the header and looking for the end mark.
    Raises:
        DataError: why the image is unusable, in a few words.
    """
    if len(data) == 0:
        raise DataError("empty")
    facts, header_bytes = (None if decode else _read_jpeg(data)) or _read_any(data, decode)
    if facts.width * facts.height > MAX_PIXELS:
        raise DataError(f"absurdly large: {facts.width} x {facts.height} pixels")
    if not _is_whole(data, header_bytes, facts.extension):
        raise DataError(f"cut short: the end of the {facts.extension} file is missing")
    return facts


def _read_jpeg(data) -> tuple[ImageFacts, int] | None:
    """Facts and header bytes of a common JPEG file, else None; 5 us, where Pillow takes 50."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    position, size, unusual = 2, None, ()
    try:
        while (marker := data[position + 1]) != _SCAN:
            num_bytes = data[position + 2] << 8 | data[position + 3]
            if marker in _FRAMES:
                precision, height, width, num_channels = _FRAME.unpack_from(data, position + 4)
                size = width, height
                mode = _JPEG_MODES[precision, num_channels]
            elif marker == _APP1 and _orientation(data[position + 4 : position + 2 + num_bytes]):
                unusual = ("EXIF-rotated",)
            position += 2 + num_bytes
            if data[position] != 0xFF:
                return None
        if size is None or 0 in size:
            return None
    except (IndexError, KeyError, struct.error):
        return None
    if mode not in _PLAIN_MODES:
        unusual = (f"mode {mode}", *unusual)
    return ImageFacts("jpg", mode, *size, unusual), position


def _orientation(segment) -> bool:
    """Whether an APP1 segment says that the image is to be turned."""
    if segment[:6] != b"Exif\0\0":
        return False
    exif = Image.Exif()
    try:
        exif.load(bytes(segment))
    except (SyntaxError, ValueError, OSError, struct.error):
        return False
    return exif.get(_ORIENTATION, 1) != 1


def _read_any(data, decode: bool) -> tuple[ImageFacts, int]:
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(stream, formats=_FORMATS)
            header_bytes = stream.tell()
            facts = _facts(image)
            if decode:
                image.load()
    except UnidentifiedImageError:
        raise DataError(f"not an image (begins with {bytes(data[:8])!r})") from None
    except Image.DecompressionBombError:
        raise DataError(f"absurdly large: more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        raise DataError(f"does not decode ({str(error) or type(error).__name__})") from None
    return facts, header_bytes


def _facts(image: Image.Image) -> ImageFacts:
    unusual = []
    if image.mode not in _PLAIN_MODES:
        unusual.append(f"mode {image.mode}")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        unusual.append("animated")
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
        unusual.append("EXIF-rotated")
    return ImageFacts(EXTENSIONS[image.format], image.mode, *image.size, tuple(unusual))


def _is_whole(data, header_bytes: int, extension: str) -> bool:
    """Whether the format's end mark is there. Bytes after it are common and harmless."""
    if extension in _END_MARKS:
        # Pillow stops at the first scan; a thumbnail's end mark stands before it.
        mark = _END_MARKS[extension]
        return data[-len(mark) :] == mark or bytes(data[header_bytes:]).rfind(mark) >= 0
    if extension == "gif":  # the mark is one byte: one cut in 256 goes unseen
        return bytes(data[-16:]).rstrip(b"\0").endswith(b"\x3b")
    stated = {"webp": data[4:8], "bmp": data[2:6]}[extension]
    return int.from_bytes(stated, "little") + (8 if extension == "webp" else 0) <= len(data)


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
