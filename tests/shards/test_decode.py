"""Laws of decoding: Pillow's pixels for every kind of file, and never a gray picture."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock, call

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from simplejpeg import encode_jpeg as simplejpeg_encode

from wds_convnext.shards.decode import Box, decode_rgb
from wds_convnext.shards.image import inspect_image
from wds_convnext.shards.limits import ImageError

# pytest sets the filters anew for each test; test_pillow_warns_nobody shows what users see.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL.TiffImagePlugin", "ignore::UserWarning:PIL.Image"
)


EOI = b"\xff\xd9"


# EXIF with one entry: orientation 6, turned by 90 degrees.
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"


# Options of Pillow's encoder; "mode" is the picture's own.
JPEG_KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "coarse": {"quality": 5},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 2},
    "EXIF orientation": {"exif": TURNED},
    "RGB, not YCbCr": {"keep_rgb": True},
    "gray": {"mode": "L"},
    "gray progressive": {"mode": "L", "progressive": True},
    "CMYK": {"mode": "CMYK"},
    # What Pillow's encoder does not make:
    "4:4:0": {"simplejpeg": "440"},
    "4:1:1": {"simplejpeg": "411"},
    "scan per component": {"mode": "L", "num_scans": 3},
}


def photograph(height, width, mode="RGB"):
    """Smooth shapes plus grain: neither flat nor incompressible."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    channels = [128 + 90 * np.sin(y / (5 + c) + c) * np.cos(x / (9 - c)) for c in range(3)]
    pixels = np.stack(channels, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def encode_jpeg(height, width, mode="RGB", simplejpeg=None, num_scans=1, **options):
    image = photograph(height, width, mode)
    if simplejpeg:
        return simplejpeg_encode(np.asarray(image), colorsubsampling=simplejpeg)
    encoded = encode(image, "JPEG", **options)
    return encoded if num_scans == 1 else with_scan_per_component(encoded)


def with_scan_per_component(gray):
    """A color JPEG of three scans, one after the other, each of them a gray JPEG's only one."""
    frame_at, scan_at = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    bits_and_size, entropy_coded = gray[frame_at + 4 : frame_at + 9], gray[scan_at + 10 : -2]
    frame = b"\xff\xc0\0\x11" + bits_and_size + b"\3\1\x11\0\2\x11\0\3\x11\0"
    scans = [b"\xff\xda\0\x08\1%c\0\0\x3f\0" % i + entropy_coded for i in (1, 2, 3)]
    return gray[:frame_at] + frame + gray[frame_at + 13 : scan_at] + b"".join(scans) + EOI


def pillow_rgb(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def crop(pixels, box):
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


@st.composite
def boxes(draw, height, width):
    box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - box_height)), draw(st.integers(0, width - box_width))
    return Box(top, left, box_height, box_width)


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 70), data=st.data())
def test_a_box_has_the_pixels_of_the_whole_image_and_of_pillow(options, height, width, data):
    """Stopping at the box's lower edge changes no pixel, whatever the JPEG's layout."""
    encoded = encode_jpeg(height, width, **options)
    box = data.draw(boxes(height, width))

    pixels = decode_rgb(encoded, lambda *size: box)

    np.testing.assert_array_equal(pixels, crop(decode_rgb(encoded), box))
    np.testing.assert_array_equal(pixels, crop(pillow_rgb(encoded), box))


def test_rows_below_the_box_are_not_decoded():
    """The law above is about a real short cut: the array behind the box has fewer rows."""
    encoded = encode_jpeg(400, 60)

    pixels = decode_rgb(encoded, lambda height, width: Box(10, 5, 20, 30))

    assert pixels.shape == (20, 30, 3)
    assert len(pixels.base) < 60


def test_choose_box_is_given_height_and_width_once():
    choose_box = Mock(return_value=Box(0, 0, 1, 1))

    decode_rgb(encode_jpeg(30, 50), choose_box)
    decode_rgb(encode(photograph(70, 90), "PNG"), choose_box)

    assert choose_box.mock_calls == [call(30, 50), call(70, 90)]


def test_exif_orientation_is_ignored():
    encoded = encode_jpeg(30, 50, exif=TURNED)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).size == (30, 50)

    pixels = decode_rgb(encoded)

    assert pixels.shape == (30, 50, 3)


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def palette_with_alpha():
    image = photograph(40, 30).quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def photograph_with_alpha(mode):
    image = photograph(40, 30, mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


OTHER_FORMATS = {
    "PNG": encode(photograph(40, 30), "PNG"),
    "PNG gray": encode(photograph(40, 30, "L"), "PNG"),
    "PNG 1 bit": encode(photograph(40, 30, "1"), "PNG"),
    "PNG palette": encode(photograph(40, 30).quantize(16), "PNG"),
    "PNG palette with alpha": encode(palette_with_alpha(), "PNG"),
    "PNG alpha": encode(photograph_with_alpha("RGB"), "PNG"),
    "PNG gray with alpha": encode(photograph_with_alpha("L"), "PNG"),
    "WebP": encode(photograph(40, 30), "WEBP"),
    "WebP lossless with alpha": encode(photograph_with_alpha("RGB"), "WEBP", lossless=True),
    "GIF": encode(photograph(40, 30), "GIF"),
    "GIF animation": encode(
        photograph(40, 30), "GIF", save_all=True, append_images=[Image.new("RGB", (30, 40))]
    ),
    "BMP": encode(photograph(40, 30), "BMP"),
}


@pytest.mark.parametrize("encoded", OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_other_formats_have_the_pixels_of_pillow(encoded):
    """Alpha is dropped, not composited; of an animation the first frame is taken."""
    box = Box(top=7, left=3, height=20, width=11)

    pixels = decode_rgb(encoded, lambda *size: box)

    np.testing.assert_array_equal(pixels, crop(pillow_rgb(encoded), box))


@pytest.mark.parametrize("file_format", ["TIFF", "PPM", "ICO"])
def test_formats_that_no_member_is_named_after_are_refused(file_format):
    """Also under another name: conversion leaves them out, so training does not take them."""
    encoded = encode(photograph(40, 30), file_format)

    for judge in (inspect_image, decode_rgb):
        with pytest.raises(ImageError, match="not an image"):
            judge(encoded)


def test_sixteen_bit_gray_keeps_its_high_byte():
    """Pillow's convert("RGB") would turn every value over 255 into white."""
    gray = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)

    pixels = decode_rgb(encode(Image.fromarray(gray), "PNG"))

    np.testing.assert_array_equal(pixels, np.stack([gray >> 8] * 3, axis=-1))


def test_sixteen_bit_rgb_keeps_its_high_byte():
    rgb = np.arange(0, 65536, 64, dtype=">u2")[: 8 * 8 * 3].reshape(8, 8, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]

    pixels = decode_rgb(b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, *zip(*chunks))))

    np.testing.assert_array_equal(pixels, rgb >> 8)


def test_threads_do_not_change_pixels():
    files = [encode_jpeg(60, 45, **options) for options in JPEG_KINDS.values()]
    files += OTHER_FORMATS.values()
    expected = [decode_rgb(file) for file in files]

    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(decode_rgb, files * 20))

    for pixels, reference in zip(decoded, expected * 20):
        np.testing.assert_array_equal(pixels, reference)
