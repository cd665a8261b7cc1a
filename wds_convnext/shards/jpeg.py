"""The header of a JPEG, read as libjpeg reads it (ITU-T T.81): 5 us, without a decoder."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from wds_convnext.shards.limits import CONVERSION_LIMITS, PILLOW_BYTES, ImageError, Limits

# JPEG markers (ITU-T T.81, table B.1): a byte 0xFF, then one of these.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_HUFFMAN = (0xC0, 0xC1)
_START_OF_SCAN, _RESTART_INTERVAL, _FILL = 0xDA, 0xDD, 0xFF
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # no length follows
_IMAGE_MARKS = (0xD8, 0xD9)  # start and end of an image, neither of which belongs in a header
# Frame, tables of codes and quantization, restarts. JFIF and Adobe say how colors are stored.
_OF_PIXELS = _START_OF_FRAME | {0xC4, 0xCC, 0xDB, _RESTART_INTERVAL}
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_MAX_STRAY = 1 << 16  # bytes
_JPEG_MODES = {(8, 1): "L", (8, 3): "RGB", (8, 4): "CMYK"}  # by bits and number of components
_END = b"\xff\xd9"


class JpegHeader(NamedTuple):  # made in a third of a dataclass's time
    """What the segments before the first scan of a JPEG say."""

    height: int
    width: int
    mode: str  # "L", "RGB" or "CMYK", with 8 bits each
    height_at: int  # offset of the two bytes that hold the height
    is_one_run: bool  # sequential Huffman code, one scan, no restart markers
    is_plain: bool  # no byte stands between the segments
    exif: slice | None  # where its EXIF is


def read_jpeg_header(
    data: bytes | memoryview, limits: Limits = CONVERSION_LIMITS
) -> JpegHeader | None:
    """The header of a JPEG, or None for what is left to Pillow: other formats, odd JPEGs.

    Raises:
        ImageError: if the JPEG is beyond the limits, or its end mark is missing.
    """
    if data[:2] != b"\xff\xd8":
        return None
    frames, has_restarts, exif, is_plain, expected_at = [], False, None, True, 2
    try:
        for marker, at, end in jpeg_segments(data):
            if marker in _START_OF_FRAME:
                frames.append((at, marker))
            elif marker == _APP1 and exif is None and data[at + 4 : at + 10] == b"Exif\0\0":
                exif = slice(at + 4, end)
            has_restarts |= marker == _RESTART_INTERVAL
            is_plain, expected_at = is_plain and at == expected_at, end
        if len(frames) != 1 or marker != _START_OF_SCAN:
            return None
        ((frame_at, frame_marker),) = frames
        bits, height, width, num_components = struct.unpack_from(">BHHB", data, frame_at + 4)
        num_scanned = data[at + 4]
    except (IndexError, struct.error):  # the bytes end in the header
        return None
    mode = _JPEG_MODES.get((bits, num_components))
    if mode is None:
        return None
    is_one_scan = frame_marker in _SEQUENTIAL_HUFFMAN and num_scanned == num_components
    bytes_per_pixel = PILLOW_BYTES if mode == "CMYK" else 3 if is_one_scan else 9
    limits.check(height, width, bytes_per_pixel)
    if not is_one_scan:
        limits.check_scans(bytes(data[at:]).count(b"\xff\xda"), height * width)
    if not has_jpeg_end(data, at):
        raise ImageError("cut short: the end of the jpg file is missing")
    is_one_run = is_one_scan and not has_restarts
    return JpegHeader(height, width, mode, frame_at + 5, is_one_run, is_plain, exif)


def has_jpeg_end(data: bytes | memoryview, start: int) -> bool:
    """Whether the end mark comes at `start` or later; before it stands that of a thumbnail."""
    return data[-2:] == _END or bytes(data[start:]).rfind(_END) >= 0


def jpeg_segments(data: bytes | bytearray | memoryview) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG up to its first scan, as libjpeg sees them.

    Ends early where libjpeg would give up.

    Raises:
        IndexError: if the bytes end before a scan.
    """
    at = 2
    while True:
        start = at
        # Stray bytes are passed over, and any number of fill bytes before a marker (T.81, B.1.1.2).
        while data[at] != 0xFF or data[at + 1] in (_FILL, 0x00):
            at += 1
            if at - start > _MAX_STRAY:
                return
        marker = data[at + 1]
        if marker in _STANDALONE:
            at += 2
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in _IMAGE_MARKS or end < at + 4:
            return
        yield marker, at, end
        if marker == _START_OF_SCAN:
            return
        at = end


def bare_jpeg(data: bytes | bytearray) -> bytes:
    """A JPEG with only the segments that its pixels depend on, and no stray bytes before a scan.

    What is left out cannot be the reason of a complaint about it.
    """
    parts = [data[:2]]
    for marker, at, end in jpeg_segments(data):
        if marker == _START_OF_SCAN:
            parts.append(data[at:])
        elif marker in _OF_PIXELS:
            parts.append(data[at:end])
        elif marker == _APP0 and data[at + 4 : at + 9] == b"JFIF\0" and end - at >= len(_JFIF):
            parts.append(_JFIF)
        elif marker == _APP14 and data[at + 4 : at + 9] == b"Adobe" and end - at >= 16:
            parts += [data[at : at + 15], bytes([min(data[at + 15], 1)]), data[at + 16 : end]]
    return b"".join(parts)
