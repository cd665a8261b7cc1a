"""Images are recognised by content, and unusable ones found."""

import io
import struct
import zlib

import pytest
from parquet_sets import encode
from PIL import Image

from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.image import EXTENSIONS, inspect_image
from wds_convnext.shards.limits import MAX_PIXELS, ImageError
from wds_convnext.shards.tar import IMAGE_EXTENSIONS

# pytest sets the filters anew for each test; test_pillow_warns_nobody shows what users see.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL.TiffImagePlugin", "ignore::UserWarning:PIL.Image"
)

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}


@pytest.mark.parametrize("image_format", FORMATS)
def test_format_and_size_are_read_from_the_content(image_format):
    """Of a view of the bytes, too; the header check and the full decode agree."""
    data = encode(1, image_format)

    facts = inspect_image(memoryview(data))

    assert (facts.extension, facts.width, facts.height) == (FORMATS[image_format], 24, 18)
    assert decode_rgb(data).shape == (18, 24, 3)


def test_each_format_has_a_member_to_stand_in():
    """What conversion writes, the reader of shards finds."""
    assert set(EXTENSIONS.values()) | {"jpeg"} == set(IMAGE_EXTENSIONS)


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_cut_at_any_place_is_found_by_its_header_check(image_format):
    """No cut passes, whether in the header or in the pixels."""
    data = encode(1, image_format)

    for num_bytes in range(len(data)):
        with pytest.raises(ImageError, match="empty|cut short|not an image|does not decode"):
            inspect_image(data[:num_bytes])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (encode(0, "TIFF"), "a TIFF image"),
        (encode(0, "AVIF"), "an AVIF image"),
        (encode(0, "JPEG2000"), "a JPEG 2000 image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    ],
)
def test_another_format_is_named_with_what_to_do(data, what):
    """So that nobody looks for damage."""
    with pytest.raises(ImageError, match=rf"but {what}\. (Convert|Download|Fetch)"):
        inspect_image(data)


@pytest.mark.parametrize("image_format", FORMATS)
def test_bytes_after_the_end_are_harmless(image_format):
    """Cameras and servers append to files; decoders ignore it."""
    data = encode(1, image_format)

    for tail in (b"\0" * 10 + b"<!-- cached -->", b"\0" * 4096, data[:50]):
        assert inspect_image(data + tail) == inspect_image(data)
        assert decode_rgb(data + tail).shape == (18, 24, 3)


@pytest.mark.parametrize("data", [b"not an image at all", b"<html>404</html>", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(data):
    """An error page saved under .jpg is no image."""
    with pytest.raises(ImageError, match="not an image|does not decode"):
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

    with pytest.raises(ImageError, match="too large"):
        inspect_image(bytes(data))


def test_pixels_that_do_not_decode_are_found_by_decoding():
    """A PNG with damaged pixel data has a sound header and end."""
    data = bytearray(encode(1, "PNG", size=(64, 64)))
    data[len(data) // 2] ^= 0xFF

    assert inspect_image(data)
    with pytest.raises(ImageError, match="does not decode"):
        decode_rgb(bytes(data))


def test_what_readers_trip_over_is_noted():
    """CMYK, rotated, animated and progressive images are usable, and reported."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])

    assert inspect_image(encode(1, mode="CMYK")).unusual == ("mode CMYK",)
    assert inspect_image(encode(1, exif=exif)).unusual == ("EXIF-rotated",)
    assert "animated" in inspect_image(animated.getvalue()).unusual
    assert inspect_image(encode(1, mode="L", progressive=True)).mode == "L"
    assert inspect_image(encode(1)).unusual == ()


def exif_block():
    """EXIF with an orientation, a text, a fraction and a nested directory."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a picture", 72.0
    exif.get_ifd(0x8769).update({0x9003: "2026:11:25 08:00:00", 0x829A: 0.01})
    return exif.tobytes()


def odd_exif_blocks():
    """A sound block, then cut, overwritten and absurd ones."""
    block = exif_block()
    yield from (block[:size] for size in range(6, len(block), 7))
    for at in range(6, len(block), 3):
        for noise in (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\0\x01"):
            yield block[:at] + noise + block[at + len(noise) :]
    header = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"
    for kind in range(20):  # types of the orientation, known and unknown
        yield header + struct.pack(">HII", kind, 1, 0x00060000) + bytes(4)
        yield header + struct.pack(">HII", kind, 0, 0) + bytes(4)
        yield header + struct.pack(">HII", kind, 0xFFFFFFFF, 0xFFFFFFF0) + bytes(4)


@pytest.mark.parametrize(
    ("image_format", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")]
)
def test_no_fault_of_exif_makes_a_good_image_unusable(image_format, mode):
    """Neither an error nor a traceback; EXIF is metadata, and pixels do not depend on it."""
    pixels = decode_rgb(encode(1, image_format, mode=mode))
    assert (
        "EXIF-rotated"
        in inspect_image(encode(1, image_format, mode=mode, exif=exif_block())).unusual
    )

    for block in odd_exif_blocks():
        data = encode(1, image_format, mode=mode, exif=block)
        facts = inspect_image(data)

        assert (facts.width, facts.height, facts.mode) == (24, 18, mode), block
        assert (decode_rgb(data) == pixels).all(), block


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_an_image_without_pixels_is_refused(image_format):
    """The header states a height of zero."""
    data = bytearray(encode(1, image_format))
    start, num_bytes = {"JPEG": (data.find(b"\xff\xc0") + 5, 2), "PNG": (20, 4)}[image_format]
    data[start : start + num_bytes] = bytes(num_bytes)

    for judge in (inspect_image, decode_rgb):
        with pytest.raises(ImageError):
            judge(bytes(data))
