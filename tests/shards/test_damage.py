"""A damaged, cut or forged image is an error, never a gray picture."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import (
    EOI,
    JPEG_KINDS,
    OTHER_FORMATS,
    encode,
    encode_jpeg,
    photograph,
    pillow_rgb,
    png_chunk,
)

from wds_convnext.shards.decode import Box, decode_rgb
from wds_convnext.shards.image import inspect_image
from wds_convnext.shards.limits import MAX_PIXELS, ImageError


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
def test_a_jpeg_cut_anywhere_is_an_error(options):
    """Also where the cut lies below the rows that are asked for."""
    encoded = encode_jpeg(48, 20, **options)
    top_row = Box(0, 0, 1, 20)

    for size in range(len(encoded)):
        with pytest.raises(ImageError):
            decode_rgb(encoded[:size], lambda *_: top_row)


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "gray", "restart markers", "progressive"])
@pytest.mark.parametrize("tail", [EOI, EOI + b"\0" * 512, encode_jpeg(8, 8)], ids=range(3))
def test_a_cut_jpeg_is_an_error_though_an_end_marker_follows(kind, tail):
    """What a repair tool, padding, or the next file of a damaged archive leave behind."""
    encoded = encode_jpeg(96, 64, quality=95, **JPEG_KINDS[kind])
    upper_half = Box(0, 0, 48, 64)
    scan_at = encoded.index(b"\xff\xda")

    for size in range(scan_at + 20, scan_at + (len(encoded) - scan_at) // 3, 37):
        with pytest.raises(ImageError):
            decode_rgb(encoded[:size] + tail, lambda *_: upper_half)


def with_fill_bytes(jpeg):
    """0xFF before each marker of the header, as T.81 allows."""
    scan_at, at, parts = jpeg.index(b"\xff\xda"), 2, [jpeg[:2]]
    while at < scan_at:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        parts.append(b"\xff\xff" + jpeg[at:end])
        at = end
    return b"".join(parts) + b"\xff" + jpeg[scan_at:]


def test_fill_bytes_before_markers_hide_no_damage():
    """Pillow alone would decode the cut picture, and its lower part would be gray."""
    encoded = encode_jpeg(96, 64)
    filled = with_fill_bytes(encoded)
    cut = filled[: len(filled) // 2] + EOI

    np.testing.assert_array_equal(decode_rgb(filled), decode_rgb(encoded))
    assert len(pillow_rgb(cut)) == 96
    with pytest.raises(ImageError, match="does not decode"):
        decode_rgb(cut)


def test_a_cut_jpeg_padded_with_zeros_is_an_error():
    encoded = encode_jpeg(96, 64)

    with pytest.raises(ImageError, match="cut short"):
        decode_rgb(encoded[: len(encoded) // 2].ljust(len(encoded), b"\0"))


def test_the_end_marker_of_a_thumbnail_does_not_hide_a_cut():
    thumbnail = b"Exif\0\0" + encode_jpeg(8, 8)
    encoded = encode_jpeg(48, 20, exif=thumbnail)
    assert encoded.count(EOI) == 2

    with pytest.raises(ImageError, match="cut short"):
        decode_rgb(encoded[:-2])


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
@pytest.mark.parametrize("tail", [b"\0", b"\r\n", b"\xff", encode_jpeg(8, 8)], ids=range(4))
def test_bytes_after_the_end_of_a_jpeg_are_ignored(options, tail):
    encoded = encode_jpeg(48, 20, **options)

    np.testing.assert_array_equal(decode_rgb(encoded + tail), decode_rgb(encoded))


@pytest.mark.parametrize("encoded", OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_another_format_cut_anywhere_is_an_error_or_the_whole_picture(encoded):
    """Whole: where only bytes after the first frame's pixels are missing."""
    whole, num_errors = decode_rgb(encoded), 0

    for size in range(len(encoded)):
        try:
            np.testing.assert_array_equal(decode_rgb(encoded[:size]), whole)
        except ImageError:
            num_errors += 1

    assert num_errors >= len(encoded) // 2


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"not an image"])
def test_what_is_not_an_image_is_an_error_of_one_line(data):
    with pytest.raises(ImageError) as caught:
        decode_rgb(data)

    assert "\n" not in str(caught.value)
    assert " object at 0x" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 600), st.sampled_from(["JPEG", "PNG", "GIF"]))
def test_damage_gives_pixels_or_an_image_error(noise, at, file_format):
    """No other exception leaves the decoder, whatever the bytes."""
    encoded = encode(photograph(20, 20), file_format)
    damaged = encoded[:at] + noise + encoded[at + len(noise) :]

    try:
        pixels = decode_rgb(damaged)
    except ImageError:
        return

    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


@settings(max_examples=300, deadline=None)
@given(
    st.binary(min_size=1, max_size=8), st.integers(0, 2000), st.sampled_from(list(OTHER_FORMATS))
)
def test_what_decodes_is_what_the_header_check_accepts(noise, at, kind):
    """One judgement: training takes nothing that conversion refuses."""
    encoded = OTHER_FORMATS[kind]
    damaged = encoded[:at] + noise + encoded[at + len(noise) :]

    try:
        pixels = decode_rgb(damaged)
    except ImageError:
        return
    facts = inspect_image(damaged)

    assert (facts.height, facts.width) == pixels.shape[:2]


def forge_jpeg_size(height, width):
    encoded = encode_jpeg(16, 16)
    size_at = encoded.index(b"\xff\xc0") + 5
    return encoded[:size_at] + struct.pack(">HH", height, width) + encoded[size_at + 4 :]


def forge_png_size(height, width):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, *zip(*chunks)))


@pytest.mark.parametrize("forge_size", [forge_jpeg_size, forge_png_size])
def test_a_pixel_bomb_is_refused_by_its_header(forge_size):
    assert MAX_PIXELS < 65_500 * 65_500

    with pytest.raises(ImageError, match="pixels"):
        decode_rgb(forge_size(65_500, 65_500))


def test_a_height_beyond_the_data_is_an_error():
    with pytest.raises(ImageError):
        decode_rgb(forge_jpeg_size(160, 16))


def test_pillow_warns_nobody():
    """A palette with alpha, and an image between Pillow's two limits, make Pillow warn."""
    program = (
        "import sys\n"
        "from PIL import Image\n"
        "from wds_convnext.shards.decode import decode_rgb\n"
        "Image.MAX_IMAGE_PIXELS = 1000\n"
        "print(decode_rgb(sys.stdin.buffer.read()).shape)\n"
    )
    palette_1200_pixels = OTHER_FORMATS["PNG palette with alpha"]

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        input=palette_1200_pixels,
        capture_output=True,
    )

    assert (done.stdout, done.stderr) == (b"(40, 30, 3)\n", b"")
