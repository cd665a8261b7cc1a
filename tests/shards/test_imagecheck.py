"""Images are recognised by content, and unusable ones found."""

import io
import struct
import zlib

import pytest
from parquet_sets import encode
from PIL import Image

from wds_convnext.errors import DataError
from wds_convnext.shards.imagecheck import MAX_PIXELS, inspect_image

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("image_format", FORMATS)
def test_format_and_size_are_read_from_the_content(image_format, decode):
    """The header check and the full decode agree on what an image is."""
    facts = inspect_image(memoryview(encode(1, image_format)), decode=decode)

    assert (facts.extension, facts.width, facts.height) == (FORMATS[image_format], 24, 18)


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_cut_at_any_place_is_found_by_its_header_check(image_format):
    """No cut passes, whether in the header or in the pixels."""
    data = encode(1, image_format)

    for num_bytes in range(len(data)):
        with pytest.raises(DataError, match="empty|cut short|not an image|does not decode"):
            inspect_image(data[:num_bytes])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_bytes_after_the_end_are_harmless(image_format):
    """Cameras and servers append to files; decoders ignore it."""
    assert inspect_image(encode(1, image_format) + b"\0" * 10 + b"<!-- cached -->")


@pytest.mark.parametrize("data", [b"not an image at all", b"<html>404</html>", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(data):
    """An error page saved under .jpg is no image."""
    with pytest.raises(DataError, match="not an image|does not decode"):
        inspect_image(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_a_pixel_bomb_is_refused_unopened(image_format):
    """A small file that states an absurd size is not decoded."""
    data = bytearray(encode(1, image_format))
    if image_format == "PNG":
        data[16:24] = struct.pack(">II", 30_000, 30_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    assert MAX_PIXELS < 30_000**2

    with pytest.raises(DataError, match="absurdly large"):
        inspect_image(bytes(data))


def test_pixels_that_do_not_decode_are_found_by_decoding():
    """A PNG with damaged pixel data has a sound header and end."""
    data = bytearray(encode(1, "PNG", size=(64, 64)))
    data[len(data) // 2] ^= 0xFF

    assert inspect_image(data)
    with pytest.raises(DataError, match="does not decode"):
        inspect_image(data, decode=True)


def test_what_readers_trip_over_is_noted():
    """CMYK, rotated, animated and progressive images are usable, and reported."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])

    assert inspect_image(encode(1, mode="CMYK")).unusual == ("mode CMYK",)
    assert inspect_image(encode(1, exif=exif)).unusual == ("EXIF-rotated",)
    assert "animated" in inspect_image(animated.getvalue()).unusual
    assert inspect_image(encode(1, mode="L", progressive=True)).mode == "L"
    assert inspect_image(encode(1)).unusual == ()
