"""Laws of decoding: Pillow's pixels for every kind of file, and never a gray picture."""

import io
import struct
import subprocess
import sys
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
from wds_convnext.shards.limits import MAX_PIXELS, ImageError

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


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


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


def test_threads_do_not_change_pixels():
    files = [encode_jpeg(60, 45, **options) for options in JPEG_KINDS.values()]
    files += OTHER_FORMATS.values()
    expected = [decode_rgb(file) for file in files]

    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(decode_rgb, files * 20))

    for pixels, reference in zip(decoded, expected * 20):
        np.testing.assert_array_equal(pixels, reference)
