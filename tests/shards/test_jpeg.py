"""JPEG headers are read as libjpeg reads them; limits hold before memory or time is taken."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wds_convnext.shards.decode import Box, decode_rgb
from wds_convnext.shards.image import inspect_image
from wds_convnext.shards.jpeg import jpeg_segments
from wds_convnext.shards.limits import ImageError


def encode(*, size=(160, 120), **options) -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(
        file, "JPEG", **options
    )
    return file.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


KINDS = {
    "baseline": encode(),
    "progressive": encode(progressive=True),
    "restarts": encode(restart_marker_blocks=4),
}
STRAY = st.binary(min_size=1, max_size=9).map(lambda data: data.replace(b"\xff", b"\xff\x00"))
HARMLESS = st.one_of(
    STRAY,
    st.sampled_from([0x01, *range(0xD0, 0xD8)]).map(lambda marker: bytes([0xFF, marker])),
    st.just(b"\xff\xff\xff"),
    st.binary(max_size=20).map(lambda data: segment(0xE2, b"ICC_PROFILE\0" + data)),
    st.binary(max_size=20).map(lambda data: segment(0xFE, data)),
    st.binary(max_size=20).map(lambda data: segment(0xE1, b"Exif\0\0" + data)),
    st.just(segment(0xE0, b"JFIF\0\7\7\0\0\1\0\1\0\0")),
    st.just(segment(0xEE, b"Adobe\0d\0\0\0\0\7")),
)


@given(data=st.data(), kind=st.sampled_from(list(KINDS)), height=st.integers(1, 120))
def test_what_libjpeg_merely_warns_of_changes_no_pixel_and_hides_no_damage(data, kind, height):
    """Stray bytes, lone markers, broken profiles and EXIF between the segments of the header."""
    encoded = KINDS[kind]
    *starts, scan_at = [at for _, at, _ in jpeg_segments(encoded)]
    junk = data.draw(HARMLESS)
    at = data.draw(st.sampled_from([*starts[1:], scan_at]))
    odd = encoded[:at] + junk + encoded[at:]
    torn = odd[: -len(encoded) // 2] + encoded[-2:]

    pixels = decode_rgb(odd, lambda h, w: Box(0, 0, height, w))

    assert (pixels == decode_rgb(encoded)[:height]).all()
    assert inspect_image(odd).width == 160
    with pytest.raises(ImageError):
        decode_rgb(torn)


@given(data=st.data())
def test_pixels_are_those_that_libjpeg_decodes_and_never_memory_as_it_was(data):
    """Headers of any markers and lengths: an error, or the decoder's own size and pixels."""
    encoded = KINDS["baseline"]
    frame_at = next(at for marker, at, _ in jpeg_segments(encoded) if marker == 0xC0)
    frame = bytearray(encoded[frame_at : frame_at + 19])
    frame[5:9] = struct.pack(">HH", *data.draw(st.tuples(*[st.sampled_from([8, 120, 400])] * 2)))
    marker = data.draw(st.sampled_from([0x01, 0xD0, 0xD7, 0xD8, 0xFE, 0x02, 0xC0, 0xDB]))
    length = struct.pack(">H", data.draw(st.sampled_from([0, 1, 2, 19, 21, 40])))
    inserted = bytes([0xFF, marker]) + length + data.draw(st.sampled_from([b"", bytes(frame)]))
    at = data.draw(st.sampled_from([at for _, at, _ in jpeg_segments(encoded)]))
    forged = encoded[:at] + inserted + encoded[at:]

    try:
        pixels = decode_rgb(forged)
    except ImageError:
        return
    try:
        expected = simplejpeg.decode_jpeg(forged)
    except ValueError:
        expected = np.asarray(Image.open(io.BytesIO(encoded)))
    assert pixels.shape == expected.shape
    assert (pixels == expected).all()


@pytest.mark.parametrize("marker", [0x01, 0xD0, 0xD7])
def test_no_length_follows_a_lone_marker(marker):
    """Read as a length, the next marker leads to a frame of 400 x 400 within a comment."""
    encoded = KINDS["baseline"]
    frame_at = next(at for marker, at, _ in jpeg_segments(encoded) if marker == 0xC0)
    frame, rest = encoded[frame_at : frame_at + 19], encoded[frame_at + 19 :]
    large = frame[:5] + struct.pack(">HH", 400, 400) + frame[9:]
    hidden = segment(0xFE, bytes(0xFFFE - 4 - len(frame) - 4) + large)
    lone = bytes([0xFF, marker]) + segment(0xFE, b"")

    pixels = decode_rgb(encoded[:frame_at] + lone + frame + hidden + rest)

    assert (pixels == decode_rgb(encoded)).all()


def gif_bomb() -> bytes:
    side = 13_000
    head = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHH", 0, 0, side, side) + b"\0\2\2D\1\0;"


def png_bomb() -> bytes:
    side = 13_000

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels = zlib.compress(bytes(1 << 20), 1)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def scan_bomb() -> bytes:
    encoded = encode(size=(1000, 1000), progressive=True)
    last_at = encoded.rindex(b"\xff\xda")
    return encoded[:-2] + encoded[last_at : last_at + 20] * 1100 + encoded[-2:]


def large_progressive() -> bytes:
    """Coefficients of a progressive JPEG stay in memory until its last scan."""
    encoded = bytearray(KINDS["progressive"])
    at = next(at for marker, at, _ in jpeg_segments(encoded) if marker == 0xC2)
    encoded[at + 5 : at + 9] = struct.pack(">HH", 8000, 8000)
    return bytes(encoded)


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (gif_bomb, r"13000 x 13000 pixels take 2,256 MiB to decode, the limit of training is 512"),
        (png_bomb, r"take 2,256 MiB to decode, the limit of training is 512"),
        (scan_bomb, r"too many scans: 1,1\d\d, the limit of training is 1000"),
        (large_progressive, r"take 549 MiB to decode, the limit of training is 512"),
    ],
)
def test_a_bomb_is_refused_before_it_is_decoded(bomb, message):
    """By its header, with the limit in the message."""
    data = bomb()
    started = time.monotonic()

    with pytest.raises(ImageError, match=message):
        decode_rgb(data)

    assert time.monotonic() - started < 0.5


def test_conversion_accepts_more_than_training():
    """Its header check decodes nothing; what is beyond its limits, too, is refused."""
    data = large_progressive()

    assert inspect_image(data).width == 8000
    with pytest.raises(ImageError, match="the limit of conversion is 1,024"):
        inspect_image(gif_bomb())
