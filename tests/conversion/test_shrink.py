"""Large images become smaller JPEGs of the same pixels; all else is copied, and nothing is lost."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from parquet_sets import encode, image_table, read_folder, write_split
from PIL import Image
from test_conversion import convert, samples_of

from wds_convnext.check.verify import verify
from wds_convnext.config import ShardsConfig
from wds_convnext.conversion.shrink import Shrink
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.image import inspect_image


def photograph(seed: int, size=(640, 480), image_format="JPEG", mode="RGB", **save) -> bytes:
    """A smooth picture, as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, image_format, **save)
    return file.getvalue()


def shrink(data: bytes, max_side=96, quality=95) -> bytes:
    smaller = Shrink(max_side, quality).apply(data, inspect_image(data))
    assert smaller is not None
    return smaller


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture
def source(tmp_path) -> str:
    """12 rows: large and small ones in turn."""
    images = [photograph(i, (320, 200)) if i % 2 else encode(i) for i in range(12)]
    table = image_table(images, [i // 3 for i in range(12)])
    write_split(tmp_path / "in", "train", table, num_files=2)
    return str(tmp_path / "in")


@pytest.mark.parametrize("shuffle", [False, True])
def test_large_images_are_shrunk_and_small_ones_are_copied(source, tmp_path, shuffle):
    """No side is longer than asked for; labels and keys stay; the report says what was won."""
    convert(source, tmp_path / "whole", shuffle=shuffle)

    report = convert(source, tmp_path / "out", shuffle=shuffle, max_side=100)

    whole = {key: (image, label) for key, image, label in samples_of(tmp_path / "whole")}
    for key, image, label in samples_of(tmp_path / "out"):
        before, label_before = whole.pop(key)
        assert label == label_before
        facts = inspect_image(image)
        if int(key) % 2:
            assert (facts.width, facts.height, facts.extension) == (100, 62, "jpg")
        else:
            assert image == before
    assert not whole
    (split,) = report.splits
    assert split.shrunk.num_images == 6
    assert re.search(r"shrunk: 6 images, [\d.]+ MB to [\d.]+ MB \([\d.]+ x smaller\)", str(report))


def test_the_bytes_do_not_depend_on_jobs(source, tmp_path):
    """One process or two: equal files, the digests of the sources among them."""
    for jobs in (1, 2):
        convert(source, tmp_path / str(jobs), jobs=jobs, max_side=100)

    assert read_folder(tmp_path / "1") == read_folder(tmp_path / "2")
    assert (tmp_path / "1/train.sources").stat().st_size == 8 * 12


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [1600, 250])
def test_pixels_are_those_of_one_antialiased_shrink(image_format, side):
    """Whether the decoder has done a part of it (from a factor of 4 on) or not."""
    data = photograph(1, (side, side * 3 // 4), image_format, quality=95)

    shrunk = decode_rgb(shrink(data, 120))

    expected = Image.fromarray(decode_rgb(data)).resize((120, 90), Image.Resampling.LANCZOS)
    assert psnr(shrunk, np.asarray(expected)) > 38


def test_fine_lines_become_gray_and_no_moire():
    """Where pixels are left out, stripes of one pixel become wide ones."""
    stripes = np.zeros((480, 1280, 3), np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "JPEG", quality=95)

    for max_side in (100, 150, 300, 600):
        shrunk = decode_rgb(shrink(file.getvalue(), max_side))[:, 8:-8]
        assert abs(shrunk.astype(int) - 127).max() <= 24, max_side


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_orientation_is_kept_and_not_applied(orientation):
    """Training ignores it: stored pixels stay as they lie. Viewers turn them as before."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    data = photograph(2, exif=exif)

    shrunk = shrink(data)

    upright = shrink(photograph(2))
    with Image.open(io.BytesIO(shrunk)) as image:
        assert image.size == (96, 72)
        assert dict(image.getexif()) == ({0x0112: orientation} if orientation != 1 else {})
    assert np.array_equal(decode_rgb(shrunk), decode_rgb(upright))


@pytest.mark.parametrize(
    ("mode", "image_format", "expected"),
    [("L", "JPEG", "L"), ("CMYK", "JPEG", "RGB"), ("LA", "PNG", "L"), ("RGBA", "PNG", "RGB"),
     ("P", "GIF", "RGB"), ("P", "PNG", "RGB"), ("1", "PNG", "L")],
)  # fmt: skip
def test_every_mode_gives_what_training_would_see(mode, image_format, expected):
    """Alpha is dropped, CMYK becomes RGB, and gray stays gray."""
    data = photograph(3, image_format=image_format, mode=mode)

    shrunk = shrink(data)

    assert inspect_image(shrunk).mode == expected
    wanted = Image.fromarray(decode_rgb(data)).resize((96, 72), Image.Resampling.LANCZOS)
    assert psnr(decode_rgb(shrunk), np.asarray(wanted)) > 24  # hard edges of color


def test_16_bits_an_animation_and_a_color_profile():
    """The high byte; the first frame; the stored values, without the profile."""
    deep, moving, profiled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((200, 300), 0x7F33, np.uint16)).save(deep, "PNG")
    frames = [Image.new("RGB", (300, 200), color) for color in ("red", "blue")]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    Image.new("RGB", (300, 200), "red").save(profiled, "JPEG", icc_profile=bytes(5000))

    assert abs(decode_rgb(shrink(deep.getvalue())).astype(int) - 0x7F).max() <= 1
    assert decode_rgb(shrink(moving.getvalue()))[32, 48, 0] > 250
    with Image.open(io.BytesIO(shrink(profiled.getvalue()))) as image:
        assert "icc_profile" not in image.info
    assert len(shrink(profiled.getvalue())) < 2000


def test_an_extreme_shape_keeps_a_pixel():
    """A line of 3,000 x 2 pixels is one of 96 x 1."""
    assert decode_rgb(shrink(photograph(4, (3000, 2)))).shape == (1, 96, 3)


@pytest.mark.parametrize("shuffle", [False, True])
def test_damage_is_found_while_shrinking(tmp_path, shuffle):
    """It would be gray in a whole JPEG else. The row is listed, and left out on request."""
    whole = photograph(5)
    torn = whole[: len(whole) // 2] + whole[-2:]
    images = [encode(0), torn, whole, encode(3)]
    write_split(tmp_path / "in", "train", image_table(images, [0, 1, 2, 3]))

    with pytest.raises(DataError, match="1 of 4 rows are unusable, .* row 1 .* does not decode"):
        convert(tmp_path / "in", tmp_path / "out", max_side=100, shuffle=shuffle)
    convert(tmp_path / "in", tmp_path / "out", max_side=100, shuffle=shuffle, on_bad="skip")

    assert sorted(key for key, *_ in samples_of(tmp_path / "out")) == [
        "000000000", "000000002", "000000003",
    ]  # fmt: skip
    against = verify(str(tmp_path / "out"), against=str(tmp_path / "in"), jobs=1, quiet=True)
    assert against.problems == ()


def test_verify_against_compares_the_kept_digests(source, tmp_path):
    """Shrunk images with the digest of their source, copied ones with their own."""
    out = tmp_path / "out"
    convert(source, out, max_side=100)

    def problems() -> list[str]:
        report = verify(str(out), against=source, jobs=1, quiet=True)
        return [str(problem) for problem in report.problems]

    assert problems() == []
    report = verify(str(out), against=source, jobs=1, quiet=True)
    assert report.splits[0].notes[-1].startswith("6 images were shrunk: compared were the digests")
    sources = out / "train.sources"
    digests = np.fromfile(sources, "<u8")
    shrunk = np.flatnonzero(digests)
    other = digests.copy()
    other[shrunk[0]] += 1
    sources.write_bytes(other.tobytes())
    (problem,) = problems()
    assert "its image is not that of row" in problem
    sources.write_bytes(digests.tobytes()[:-1])
    assert f"{sources}: missing, or not 8 bytes a sample" in problems()[0]


def test_a_folder_converted_without_shrinking_still_reads_as_complete(source, tmp_path):
    """New keys of a conversion's identity stand there only when the option is set."""
    out = tmp_path / "out"
    convert(source, out)

    (again,) = convert(source, out).splits

    assert again.already_complete
    assert set(read_manifest(out / "train.json").options) == {
        "source_digest", "class_digest", "format_version", "columns", "num_shards", "edges",
        "shuffle", "seed", "check",
    }  # fmt: skip
    assert not (out / "train.sources").exists()
    with pytest.raises(UsageError, match="holds train with other options"):
        convert(source, out, max_side=100)


def test_options_and_versions_are_part_of_the_identity(source, tmp_path, monkeypatch):
    """Another quality or another Pillow would give other bytes; --overwrite replaces all."""
    out = tmp_path / "out"
    convert(source, out, max_side=100)
    (again,) = convert(source, out, max_side=100, quality=90).splits
    assert again.already_complete
    with pytest.raises(UsageError, match="other options"):
        convert(source, out, max_side=100, quality=80)
    monkeypatch.setattr("PIL.__version__", "99.0")
    with pytest.raises(UsageError, match="other options"):
        convert(source, out, max_side=100)

    convert(source, out, overwrite=True)

    assert not (out / "train.sources").exists()
    assert json.loads((out / "train.json").read_text())["options"].get("shrink") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 80}, "--quality is that of images that --max-side shrinks.*Give --max-side"),
        ({"max_side": 0}, "--max-side 0: expected an integer"),
        ({"max_side": 96, "quality": 101}, "--quality 101: expected an integer"),
        ({"max_side": 96, "shard_size": 10**6}, "--shard-size and --max-side exclude each other"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options, message):
    """Before anything is read."""
    with pytest.raises(UsageError, match=message):
        ShardsConfig(**options)


def test_what_is_left_of_an_interrupted_conversion_is_gone(source, tmp_path):
    """Nothing but shards, offsets, index, digests and manifest is in the folder."""
    convert(source, tmp_path / "out", max_side=100, num_shards=1)

    names = {"train-000.tar", "train-000.idx", "train.index", "train.sources", "train.json"}
    assert set(os.listdir(tmp_path / "out")) == names
    assert len(Path(tmp_path / "out/train.sources").read_bytes()) == 8 * 12
