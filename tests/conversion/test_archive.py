"""A zip or tar of class folders is read where it lies, and gives what the folder gives."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from parquet_sets import encode
from test_folder import found, shards_of, write_images

from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, UsageError

PATHS = ["train/cat/1.jpg", "train/cat/10.png", "train/cat/2.jpg", "train/dog/ü.jpg",
         "train/dog/below/3.jpg", "val/cat/4.jpg", "val/dog/5.jpg"]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two splits of class folders, with files that do not belong there."""
    write_images(tmp_path / "photos", *PATHS)
    for name in ("train/cat/._1.jpg", "train/.DS_Store", "__MACOSX/cat/1.jpg", "README.md"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"no image")
    (tmp_path / "photos/train/dog/noname").write_bytes(encode(3))
    return tmp_path / "photos"


def write_zip(folder: Path, path: Path, method=zipfile.ZIP_STORED, above="photos/") -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for inner in sorted(folder.rglob("*"), reverse=True):  # not in the order of the folder
            file.write(inner, above + str(inner.relative_to(folder)))
    return path


def write_tar(folder: Path, path: Path, **options) -> Path:
    with tarfile.open(path, "w", **options) as file:
        for inner in sorted(folder.rglob("*")):
            file.add(inner, "./" + str(inner.relative_to(folder)), recursive=False)
    return path


def tars_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("above", ["photos/", ""])
def test_a_zip_gives_the_bytes_of_its_folder(folder, tmp_path, method, above):
    """Shards, classes and notes; whatever the order of its members, packed or not."""
    shards_of(folder, tmp_path / "expected", shuffle=True)
    archive = write_zip(folder, tmp_path / "photos.zip", method, above)

    report = shards_of(archive, tmp_path / "out", shuffle=True)

    assert tars_of(tmp_path / "out") == tars_of(tmp_path / "expected")
    assert "left out: 1 files that are no images (.md 1)" not in str(report)  # above the splits
    assert not verify(str(tmp_path / "out"), against=str(archive), jobs=1, quiet=True).problems


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_holds_what_its_folder_holds(folder, tmp_path, format):
    """In its own order."""
    archive = write_tar(folder, tmp_path / "photos.tar", format=format)
    shards_of(folder, tmp_path / "expected")

    shards_of(archive, tmp_path / "out")

    for split in ("train", "val"):
        expected = found(tmp_path / "expected", split)
        assert sorted(found(tmp_path / "out", split)) == sorted(expected)
    assert not verify(str(tmp_path / "out"), against=str(archive), jobs=1, quiet=True).problems


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_a_compressed_tar_gives_the_bytes_of_the_plain_one(folder, tmp_path, suffix, compress):
    """Shuffled or in several shards; also of two processes."""
    archive = write_tar(folder, tmp_path / "photos.tar")
    packed = tmp_path / f"photos.tar{suffix}"
    packed.write_bytes(compress(archive.read_bytes()))
    for options in ({"shuffle": True}, {"num_shards": 2, "jobs": 2 if suffix == ".gz" else 1}):
        name = "-".join(options)
        shards_of(archive, tmp_path / f"plain-{name}", **options)

        shards_of(packed, tmp_path / f"packed-{name}", **options)

        assert tars_of(tmp_path / f"packed-{name}") == tars_of(tmp_path / f"plain-{name}")
    assert not verify(
        str(tmp_path / f"packed-{name}"), against=str(packed), jobs=1, quiet=True
    ).problems


def test_damaged_members_are_listed_and_left_out_on_request(folder, tmp_path):
    """A flipped bit of a stored member is found by its CRC-32."""
    archive = write_zip(folder, tmp_path / "photos.zip")
    content = bytearray(archive.read_bytes())
    content[content.index((folder / "train/cat/2.jpg").read_bytes()) + 300] ^= 1
    archive.write_bytes(content)

    with pytest.raises(DataError, match=r"1 of 6 .* cat/2.jpg: not the bytes .* \(CRC-32\)"):
        shards_of(archive, tmp_path / "out")
    shards_of(archive, tmp_path / "out", on_bad="skip")

    assert len(found(tmp_path / "out")) == 5


def test_of_two_members_of_one_name_the_last_counts(tmp_path):
    """As when the archive is unpacked."""
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "a.zip", "w") as file,
    ):
        for number, name in enumerate(["cat/1.jpg", "dog/1.jpg", "cat/1.jpg"]):
            file.writestr(name, encode(number))

    report = shards_of(tmp_path / "a.zip", tmp_path / "out")

    assert found(tmp_path / "out") == [("cat", encode(2)), ("dog", encode(1))]
    assert "1 files come again later" in str(report)


def test_zip64_and_bytes_before_the_archive_are_read(tmp_path):
    """As of an archive beyond 4 GiB, or one that unpacks itself."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for number, name in enumerate(["cat/1.jpg", "dog/2.jpg"]):
            with file.open(name, "w", force_zip64=True) as member:
                member.write(encode(number))
    data = content.getvalue()
    end = data.rindex(b"PK\5\6")
    num, size, start = struct.unpack_from("<HII", data, end + 10)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, num, num, size, start)
    wide += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    large = data[end : end + 8] + b"\xff" * 12 + data[end + 20 :]
    (tmp_path / "wide.zip").write_bytes(data[:end] + wide + large)
    (tmp_path / "late.zip").write_bytes(b"#!/bin/sh\n" + data)

    for name in ("wide", "late"):
        shards_of(tmp_path / f"{name}.zip", tmp_path / name)
        assert found(tmp_path / name) == [("cat", encode(0)), ("dog", encode(1))]


def forged(tmp_path, at_directory: int, value: bytes, name="cat/1.jpg", method=8) -> Path:
    """A zip whose directory says something else of its first member."""
    path = tmp_path / "forged.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, encode(0))
        file.writestr("dog/2.jpg", encode(1))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + at_directory
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, b"\1\0", "cat/1.jpg is encrypted. Write the zip without a password"),
        (10, b"\x63\0", "cat/1.jpg is compressed by method 99; expected stored or deflated"),
        (28, b"\xff\xff", "its directory (ends early|is longer)"),
        (0, b"PK\0\0", "its directory ends early"),
    ],
)
def test_a_zip_that_cannot_be_read_is_one_line(tmp_path, at, value, message):
    """Before anything is written."""
    with pytest.raises(UsageError, match=message):
        shards_of(forged(tmp_path, at, value), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (24, struct.pack("<I", 1 << 30), "too large: .* bytes in the zip unpack to 1,073,741,824"),
        (24, struct.pack("<I", 10), r"Not the bytes that were packed \(CRC-32\)"),
        (42, struct.pack("<I", 1 << 31), "not where the zip's directory says|cannot be read"),
    ],
)
def test_a_member_that_is_not_what_the_directory_says_is_a_bad_row(tmp_path, at, value, message):
    """A bomb takes no memory."""
    with pytest.raises(DataError, match=f"(?i)1 of 2 rows .*{message}"):
        shards_of(forged(tmp_path, at, value), tmp_path / "out")


def test_archives_without_class_folders_or_cut_short_are_one_line(folder, tmp_path):
    """With what was found, and what was expected."""
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as file:
        file.writestr("1.jpg", encode(1))
    cut = write_tar(folder, tmp_path / "cut.tar")
    os.truncate(cut, 3000)
    packed = tmp_path / "cut.tar.gz"
    packed.write_bytes(gzip.compress(write_tar(folder, tmp_path / "a.tar").read_bytes())[:-3000])
    (tmp_path / "half.zip").write_bytes(write_zip(folder, tmp_path / "b.zip").read_bytes()[:-40])

    for name, message in {
        "flat.zip": "1 files, but no images in class folders",
        "cut.tar": "not a whole tar file: ",
        "cut.tar.gz": "not a whole tar file: ",
        "half.zip": "not a whole zip file: it has no directory at its end",
    }.items():
        with pytest.raises(UsageError, match=message):
            shards_of(tmp_path / name, tmp_path / "out")
