"""Reading by number: the right bytes or a ShardError, within bounds of memory and open files."""

import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from conftest import encode_image, sample_members, write_shards, write_tar
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.errors import DataError, ShardError
from wds_convnext.shards.headers import BLOCK
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.shards.sidecar import format_sidecar, sidecar_path
from wds_convnext.shards.spec import check_size
from wds_convnext.shards.tar import walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read_all(reader: SampleReader) -> list[tuple[bytes, int]]:
    return [reader.read(number) for number in range(len(reader.dataset))]


def pairs(members: list[tuple[str, bytes]]) -> list[tuple[bytes, int]]:
    """What reading the samples of `sample_members` must give."""
    return [(image[1], int(label[1])) for image, label in zip(members[::2], members[1::2])]


@pytest.mark.parametrize("with_sidecar", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_every_sample_is_read_as_written(tmp_path, format, with_sidecar):
    """Whatever the tar's format, with and without a sidecar, in any order of reading."""
    members = sample_members(5)
    shard = write_tar(tmp_path / "a.tar", members, format=FORMATS[format])
    if with_sidecar:
        Path(sidecar_path(shard)).write_bytes(format_sidecar(list(walk_tar(shard))))
    reader = SampleReader(open_dataset(shard))

    forwards = read_all(reader)
    backwards = [reader.read(sample) for sample in reversed(range(5))]

    assert forwards == pairs(members)
    assert backwards == forwards[::-1]


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("name", ["long/" + "k" * 200, "ü" * 120])
def test_samples_of_long_names_are_read(tmp_path, format, name):
    """An extra header stands before the member's own, which still stands before the data."""
    members = [(f"{name}.cls", b"3"), (f"{name}.jpg", b"image")]
    shard = write_tar(tmp_path / "a.tar", members, format=FORMATS[format])

    assert SampleReader(open_dataset(shard)).read(0) == (b"image", 3)


def test_a_member_of_8_gigabytes_fits_the_header_check(tmp_path):
    """Sizes over 8 GiB stand in base 256; the file has a hole, so it takes no space."""
    shard = tmp_path / "a.tar"
    big = tarfile.TarInfo("a.npy")
    big.size = 9 << 30
    label, image = tarfile.TarInfo("a.cls"), tarfile.TarInfo("a.jpg")
    label.size, image.size = 1, 5
    with open(shard, "wb") as file:
        file.write(label.tobuf() + b"2".ljust(BLOCK, b"\0") + big.tobuf(tarfile.GNU_FORMAT))
        file.seek(big.size, os.SEEK_CUR)
        file.write(image.tobuf() + b"image".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    reader = SampleReader(open_dataset(str(shard)))

    assert reader.read(0) == (b"image", 2)


def test_an_image_far_from_its_label_is_read_by_itself(tmp_path):
    """What lies between them is passed over; the same bytes come."""
    members = [("a.cls", b"3"), ("a.npy", bytes(100_000)), ("a.jpg", b"image")]
    shard = write_tar(tmp_path / "a.tar", members)

    assert SampleReader(open_dataset(shard)).read(0) == (b"image", 3)


def test_webdatasets_shards_are_read(tmp_path):
    """TarWriter's members in alphabetical order of extension, `.jpeg`, `.png`, `.webp`."""
    shard = str(tmp_path / "a.tar")
    formats = ["jpeg", "png", "webp"]
    images = [encode_image(i, format=format.upper()) for i, format in enumerate(formats)]
    with webdataset.TarWriter(shard) as writer:
        for i, (format, image) in enumerate(zip(formats, images)):
            writer.write({"__key__": f"{i:03d}", format: image, "cls": 10 + i, "txt": "a caption"})

    assert read_all(SampleReader(open_dataset(shard))) == list(zip(images, [10, 11, 12]))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"7", 7),
        (b"7\n", 7),
        (b" 07 ", 7),
        (b"0", 0),
    ],
)
def test_a_cls_label_is_decimal_text(tmp_path, text, label):
    """Whitespace around it is allowed."""
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"image"), ("a.cls", text)])

    _, found = SampleReader(open_dataset(shard)).read(0)

    assert found == label


@pytest.mark.parametrize(("value", "label"), [(7, 7), (7.0, 7), ("7", 7), (0, 0)])
def test_a_json_label_is_a_whole_number_in_its_field(tmp_path, value, label):
    """As img2dataset writes it; pandas makes floats of whole numbers."""
    content = json.dumps({"caption": "a dog", "class": value, "label": 1}).encode()
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"image"), ("a.json", content)])
    reader = SampleReader(open_dataset(shard, label_field="class"))

    assert reader.read(0) == (b"image", label)


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("cls", b""),
        ("cls", b"dog"),
        ("cls", b"3.7"),
        ("cls", b"\xff\xfe"),
        ("json", b"{}"),
        ("json", b"{"),
        ("json", b"7"),
        ("json", b'{"label": "dog"}'),
        ("json", b'{"label": null}'),
        ("json", b'{"label": 3.7}'),
        ("json", b'{"label": NaN}'),
        ("json", b'{"label": Infinity}'),
        ("json", b'{"label": [3]}'),
    ],
)
def test_a_label_that_is_no_whole_number_names_its_sample(tmp_path, extension, content):
    """Rounding 3.7 to a class would be a wrong label that nobody sees."""
    shard = write_tar(
        tmp_path / "a.tar", [("n01_37.jpg", b"image"), (f"n01_37.{extension}", content)]
    )

    with pytest.raises(DataError) as error:
        SampleReader(open_dataset(shard)).read(0)

    assert str(error.value) == (
        f"{shard}, key n01_37: the label {content!r} is not an integer. "
        "Labels are class numbers, in .cls or in the field 'label' of .json."
    ) + " wds-convnext index --label-field names another field." * (extension == "json")


def test_a_raw_sample_is_webdatasets(tmp_path):
    """`__key__`, `__url__`, and the bytes of every member under its extension."""
    members = [
        ("d/a.cls", b"3"),
        ("d/a.JPG", b"image"),
        ("d/a.seg.png", b""),
        ("d/b.png", b"another"),
        ("d/b.cls", b"4"),
        ("d/b.txt", b"a caption"),
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    reader = SampleReader(open_dataset(shard))

    samples = [reader.read_raw(i) for i in range(2)]

    theirs = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [dict(sample, __local_path__=None) for sample in samples] == [
        dict(sample, __local_path__=None) for sample in theirs
    ]


def test_a_sample_is_described_by_the_image_that_is_read(tmp_path):
    """Where there are two, that is the first of the extensions, not of the members."""
    members = [("a.png", b"small"), ("a.jpg", b"the image"), ("a.cls", b"0")]
    shard = write_tar(tmp_path / "a.tar", members)
    reader = SampleReader(open_dataset(shard))

    where = reader.describe(0)

    assert where["shard"] == shard
    assert where["key"] == "a"
    assert Path(shard).read_bytes()[where["offset"] :].startswith(b"the image")
    assert reader.read(0)[0] == b"the image"


@given(moves=st.lists(st.integers(-2, 2), min_size=4, max_size=4).filter(any), data=st.data())
def test_a_stale_sidecar_gives_an_error_or_the_right_sample(tmp_path_factory, moves, data):
    """Samples of other sizes than the sidecar knows; never an image under another's label."""
    folder = tmp_path_factory.getbasetemp() / "stale"
    folder.mkdir(exist_ok=True)
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    shard = write_tar(folder / "a.tar", blocks(sizes))
    samples = list(walk_tar(shard))
    resized = [max(0, size + move) for size, move in zip(sizes, moves)]
    write_tar(folder / "a.tar", blocks(resized))
    truth = pairs(blocks(resized))
    Path(sidecar_path(shard)).write_bytes(format_sidecar(samples))
    try:
        reader = SampleReader(open_dataset(shard))
    except (ShardError, DataError) as error:
        assert shard.removesuffix(".tar") in str(error)
        return

    for sample in range(4):
        try:
            found = reader.read(sample)
        except (ShardError, DataError) as error:
            assert shard.removesuffix(".tar") in str(error)
        else:
            assert found in truth
    reader.close()


def blocks(sizes: list[int]) -> list[tuple[str, bytes]]:
    """Samples whose images fill whole blocks, so that other samples' offsets often fit a header."""
    pairs = [
        ((f"{i}.jpg", bytes([65 + i]) * size * BLOCK), (f"{i}.cls", str(i).encode()))
        for i, size in enumerate(sizes)
    ]
    return [member for pair in pairs for member in pair]


def test_a_sidecar_of_another_shard_is_refused(tmp_path):
    """The member's own header must stand before the data and tell its size."""
    shard = write_tar(tmp_path / "a.tar", sample_members(4))
    other = write_tar(tmp_path / "b.tar", sample_members(4, start=4))
    Path(sidecar_path(shard)).write_bytes(format_sidecar(list(walk_tar(other))))

    with pytest.raises(ShardError, match="a.tar"):
        read_all(SampleReader(open_dataset(shard)))


@pytest.mark.parametrize("num_samples", [3, 5])
def test_another_number_of_samples_than_the_manifests_is_refused(tmp_path, num_samples):
    """When the index is made, before anything is read."""
    manifest = write_shards(tmp_path, [4])
    shard = tmp_path / "train-000.tar"
    text = manifest.read_text()
    manifest.write_text(text.replace('"nsamples": 4', f'"nsamples": {num_samples}'))

    with pytest.raises(ShardError) as error:
        open_dataset(str(manifest))

    assert str(error.value) == (
        f"{shard}: it has 4 samples, expected {num_samples}. "
        "Delete the .idx next to it, or write the shard again."
    )


def test_another_size_than_the_manifests_is_refused(tmp_path):
    """Whether the shard was cut, or is another file; also while it is read."""
    dataset = open_dataset(str(write_shards(tmp_path, [1])))
    shard = dataset.shards[0]
    with open(shard.path, "ab") as file:
        file.write(bytes(1))
    said = (
        f"{shard.path}: {shard.num_bytes + 1:,} bytes, but its manifest says "
        f"{shard.num_bytes:,}. The shard is cut short or another file: copy it again, or write "
        "it again."
    )

    for refused in (lambda: check_size(shard), lambda: SampleReader(dataset).read(0)):
        with pytest.raises(ShardError) as error:
            refused()
        assert str(error.value) == said


def test_a_missing_shard_is_named(tmp_path):
    """Before anything is read; asking for its bytes ahead of time stops nothing."""
    dataset = open_dataset(str(write_shards(tmp_path, [1])))
    os.unlink(dataset.shards[0].path)
    reader = SampleReader(dataset)
    reader.will_read(0)

    with pytest.raises(ShardError, match=r"000.tar: No such file or directory. Copy it again"):
        reader.read(0)


def test_a_shard_cut_after_it_was_indexed_is_refused(tmp_path):
    """A file that changes under a running reader gives an error, not other bytes."""
    shard = write_tar(tmp_path / "a.tar", sample_members(4))
    reader = SampleReader(open_dataset(shard))
    reader.read(0)
    os.truncate(shard, reader.describe(3)["offset"] + 1)

    with pytest.raises(ShardError, match="a.tar: no member of"):
        reader.read(3)


@pytest.mark.parametrize("max_open", [2, 6])
def test_few_files_are_open(tmp_path, max_open):
    """However many shards are read, in whatever order; the samples stay the same."""
    dataset = open_dataset(str(write_shards(tmp_path, [3, 1, 3, 2, 3, 3])))
    truth = read_all(SampleReader(dataset))
    reader = SampleReader(dataset, max_open=max_open)
    before = num_open_files()
    most_open = 0

    found = []
    for number in range(len(dataset)):
        found.append(reader.read(number))
        reader.read(dataset.numbers_of(number * 5 % 6)[0])
        most_open = max(most_open, num_open_files() - before)

    assert found == truth
    assert most_open <= max_open
    assert reader.num_opened >= 6


def num_open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_a_closed_reader_leaves_no_file_open_and_reads_again(tmp_path):
    """Closing gives the files back; it is no end."""
    reader = SampleReader(open_dataset(str(write_shards(tmp_path, [2, 2]))))
    before = num_open_files()
    samples = read_all(reader)

    reader.close()

    assert num_open_files() == before
    assert read_all(reader) == samples


def test_reading_is_one_pread_and_two_header_checks(tmp_path):
    """A flipped bit in the size field of either header is an error, whichever member is read."""
    shard = write_tar(tmp_path / "a.tar", sample_members(1))
    whole = Path(shard).read_bytes()
    reader = SampleReader(open_dataset(shard))
    reader.read(0)

    for offset, _ in reader.dataset.index.record(0, 0).places:
        damaged = bytearray(whole)
        damaged[offset - BLOCK + 134] ^= 1
        Path(shard).write_bytes(damaged)
        with pytest.raises(ShardError, match="where its index says so"):
            reader.read(0)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS has no posix_fadvise")
def test_bytes_asked_for_are_those_that_are_read(tmp_path, monkeypatch):
    """The image and its header, so that nothing else has to come from the disk first."""
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *where: asked.append(where))
    members = sample_members(3)
    reader = SampleReader(open_dataset(write_tar(tmp_path / "a.tar", members)))

    reader.will_read(2)

    offset, num_bytes = reader.describe(2)["offset"], len(reader.read(2)[0])
    assert asked == [(offset - 512, 512 + num_bytes, os.POSIX_FADV_WILLNEED)]
