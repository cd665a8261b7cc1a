"""Offsets of members: tars as others write them, and every way a shard can be damaged."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from conftest import encode_image, sample_members, write_tar
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.errors import ShardError
from wds_convnext.shards.headers import BLOCK
from wds_convnext.shards.scan import scan_shard
from wds_convnext.shards.sidecar import format_sidecar, read_samples
from wds_convnext.shards.tar import Member, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder/" + "k" * 140


def contents(path: str) -> list[dict[str, bytes]]:
    """Each sample of a shard as {member name: data}, read at the offsets that a walk gives."""
    whole = Path(path).read_bytes()
    return [
        {m.name: whole[m.offset : m.offset + m.num_bytes] for m in sample}
        for sample in walk_tar(path)
    ]


def grouped(members: list[tuple[str, bytes]], *, per_sample: int = 2) -> list[dict[str, bytes]]:
    return [dict(members[i : i + per_sample]) for i in range(0, len(members), per_sample)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_walk_finds_the_data_of_every_member(tmp_path, format):
    """Whatever the format of the tar; empty members and whole blocks of data too."""
    members = [
        (f"{i}.{extension}", bytes([i]) * size)
        for i, size in enumerate([0, 1, 511, 512, 513, 1024])
        for extension in ("jpg", "cls")
    ]
    shard = write_tar(tmp_path / "a.tar", members, format=FORMATS[format])

    assert contents(shard) == grouped(members)


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("name", [LONG, "ü" * 80, "two words"])
def test_a_walk_finds_members_of_long_and_odd_names(tmp_path, format, name):
    """Names over 100 bytes take extra headers in GNU's and in PAX's way."""
    members = [
        (f"{name}.jpg", b"image"),
        (f"{name}.cls", b"3"),
        ("next.jpg", b""),
        ("next.cls", b""),
    ]
    shard = write_tar(tmp_path / "a.tar", members, format=FORMATS[format])

    samples = list(walk_tar(shard))

    assert contents(shard) == grouped(members)
    assert [sample[0].key for sample in samples] == [name, "next"]


def test_a_walk_reads_what_webdataset_writes(tmp_path):
    """TarWriter's shards, with its order of members and its encoding of labels."""
    shard = str(tmp_path / "a.tar")
    images = [encode_image(i) for i in range(3)]
    with webdataset.TarWriter(shard) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"dir/{i:03d}", "jpg": image, "cls": i, "json": {"label": i}})

    samples = contents(shard)

    assert [sample[f"dir/{i:03d}.jpg"] for i, sample in enumerate(samples)] == images
    assert [sample[f"dir/{i:03d}.cls"] for i, sample in enumerate(samples)] == [b"0", b"1", b"2"]
    assert all(len(sample) == 3 for sample in samples)


NAMES = [
    "a.jpg",
    "dir.v1/a.jpg",
    "./a.tar.gz",
    "a.JPG",
    "README",
    "dir.v1/README",
    ".hidden.jpg",
    "._a.jpg",
    "__meta__",
    "__meta__/a.json",
    "__a__.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_extensions_are_webdatasets(tmp_path, name):
    """Also which members belong to no sample: hidden files, no extension, `__meta__` entries."""
    shard = write_tar(tmp_path / "a.tar", [(name, b"data")])
    dataset = webdataset.WebDataset(shard, shardshuffle=False, empty_check=False)
    expected = [
        (sample["__key__"], extension)
        for sample in dataset
        for extension in sample
        if not extension.startswith("__")
    ]

    found = [(member.key, member.extension) for sample in walk_tar(shard) for member in sample]

    assert found == expected


def test_hidden_files_in_folders_are_no_members(tmp_path):
    """macOS leaves `._a.jpg` beside `a.jpg`; webdataset would make it a sample of key `dir/`."""
    shard = write_tar(tmp_path / "a.tar", [("dir/._a.jpg", b"junk"), ("dir/a.jpg", b"image")])

    assert contents(shard) == [{"dir/a.jpg": b"image"}]


def test_links_and_folders_are_no_members(tmp_path):
    """Only files have data."""
    shard = str(tmp_path / "a.tar")
    with tarfile.open(shard, "w") as tar:
        for name, kind in [("dir.d", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))

    assert contents(shard) == [{"a.jpg": b"abc"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, list[list[Member]]]:
    """The bytes of a shard of three samples, and their members."""
    path = tmp_path_factory.mktemp("whole") / "a.tar"
    shard = write_tar(path, sample_members(3))
    return path.read_bytes(), list(walk_tar(shard))


def last_end(samples: list[list[Member]]) -> int:
    last = samples[-1][-1]
    return last.offset + -(-last.num_bytes // BLOCK) * BLOCK


@pytest.mark.parametrize("with_sidecar", [False, True])
def test_a_shard_cut_anywhere_is_refused(tmp_path, whole, with_sidecar):
    """At every block, in every block, at every member boundary, with and without offsets beside."""
    data, samples = whole
    end = last_end(samples)
    cuts = {
        cut for block in range(0, end + BLOCK, BLOCK) for cut in (block, block + 1, block + 300)
    }
    path = tmp_path / "a.tar"
    if with_sidecar:
        (tmp_path / "a.idx").write_bytes(format_sidecar(samples))

    for cut in sorted(cut for cut in cuts if cut < end + BLOCK):
        path.write_bytes(data[:cut])
        with pytest.raises(ShardError) as error:
            read_samples(str(path))
        assert str(path) in str(error.value), cut
        assert "\n" not in str(error.value), cut


def test_a_shard_cut_in_its_trailing_zeros_is_whole(tmp_path, whole):
    """Nothing is lost then: one zero block after the last member is enough."""
    data, samples = whole
    path = tmp_path / "a.tar"

    for cut in range(last_end(samples) + BLOCK, len(data), BLOCK // 2):
        path.write_bytes(data[:cut])
        assert list(walk_tar(str(path))) == samples, cut


@given(data=st.data())
def test_a_flipped_bit_in_a_header_is_refused(tmp_path_factory, whole, data):
    """tarfile takes a damaged header for the end of the archive, and so loses the rest unseen."""
    content, samples = whole
    member = data.draw(st.sampled_from([member for sample in samples for member in sample]))
    position = data.draw(st.integers(member.offset - BLOCK, member.offset - 1))
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 6))
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    path.write_bytes(damaged)

    try:
        found = list(walk_tar(str(path)))
    except ShardError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        # Spaces and NULs around the checksum's digits mean the same.
        assert 148 <= position - (member.offset - BLOCK) < 156
        assert found == samples


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 100])
def test_zeros_in_place_of_a_header_are_no_end_of_the_archive(tmp_path, whole, num_blocks):
    """A hole in a file reads as zeros; what stands after it must not vanish unseen."""
    content, samples = whole
    start = samples[1][0].offset - BLOCK
    size = min(num_blocks * BLOCK, samples[-1][-1].offset - start)
    path = tmp_path / "a.tar"
    path.write_bytes(content[:start] + bytes(size) + content[start + size :])

    with pytest.raises(ShardError, match=f"a.tar: damaged.* at byte {start:,}"):
        list(walk_tar(str(path)))


def test_two_tars_end_to_end_are_refused(tmp_path, whole):
    """`cat a.tar b.tar` is read up to the first end by most readers; the rest is lost unseen."""
    content, _ = whole
    path = tmp_path / "a.tar"
    path.write_bytes(content * 2)

    with pytest.raises(ShardError, match="a.tar: damaged"):
        list(walk_tar(str(path)))


@pytest.mark.parametrize("content", [b"", b"no tar", b"no tar" * 1000])
def test_what_is_no_tar_is_refused(tmp_path, content):
    """An empty file, too: a shard without samples is written as such."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)

    with pytest.raises(ShardError, match="a.tar: not a readable tar file"):
        list(walk_tar(str(path)))


def test_a_missing_shard_is_an_error_of_ours(tmp_path):
    """With its name, like every other fault of a shard."""
    with pytest.raises(ShardError, match="gone.tar: not a readable tar file"):
        list(walk_tar(str(tmp_path / "gone.tar")))


def test_a_tar_without_samples_has_none(tmp_path):
    """An archive that is only its end is whole."""
    shard = write_tar(tmp_path / "a.tar", [])

    assert list(walk_tar(shard)) == []


def test_a_key_that_comes_back_is_refused(tmp_path):
    """Its members would be two samples, or one image would get another's label."""
    members = sample_members(2) + [("0000.png", b"again")]
    shard = write_tar(tmp_path / "a.tar", members)

    with pytest.raises(ShardError, match="a.tar: the key 0000 comes twice"):
        list(walk_tar(shard))


@pytest.mark.parametrize("name", ["0000.jpg", "0000.JPG"])
def test_two_members_of_one_extension_are_refused(tmp_path, name):
    """As webdataset does: which of them is the image cannot be known."""
    image, label = sample_members(1)
    shard = write_tar(tmp_path / "a.tar", [image, (name, b"other"), label])

    with pytest.raises(ShardError, match="a.tar, key 0000: more than one .jpg member"):
        list(walk_tar(shard))


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
@pytest.mark.parametrize("label_first", [False, True])
def test_an_index_knows_images_and_labels_of_any_kind_and_order(tmp_path, extension, label_first):
    """`.cls` before or after the image; other members are passed over."""
    image, label, text = (f"a.{extension}", b"image"), ("a.cls", b"12"), ("a.txt", b"caption")
    members = [label, text, image] if label_first else [image, text, label]
    shard = write_tar(tmp_path / "a.tar", members)
    whole = Path(shard).read_bytes()

    (sample,) = scan_shard(shard, read_samples(shard), images=True)

    (image_at, image_bytes), (label_at, label_bytes) = sample.record.places
    assert whole[image_at:][:image_bytes] == sample.image == b"image"
    assert whole[label_at:][:label_bytes] == b"12"
    assert sample.label == 12


def test_a_picture_of_gigabytes_is_refused_by_its_size(tmp_path):
    """Before a byte of it is read; the file is sparse."""
    picture, label = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.cls")
    picture.size, label.size = 3 << 30, 1
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(picture.tobuf(tarfile.GNU_FORMAT))
        file.seek(picture.size, os.SEEK_CUR)
        file.write(label.tobuf(tarfile.GNU_FORMAT) + b"0" + bytes(511 + 1024))

    with pytest.raises(ShardError, match="a.jpg has 3,221,225,472 bytes, more than"):
        list(scan_shard(str(tmp_path / "a.tar"), read_samples(str(tmp_path / "a.tar"))))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["n01_37.jpg", "n01_37.txt"],
            "a.tar, key n01_37: no .cls or .json label (found .jpg, .txt). "
            "Training needs an image and a label in every sample.",
        ),
        (
            ["img.001.jpg", "img.cls"],
            "a.tar, key img: no image (found .001.jpg, .cls). "
            "Training needs an image and a label in every sample.",
        ),
        (
            ["a.tiff", "a.cls"],
            "a.tar, key a: no image (found .tiff, .cls). "
            "Training needs an image and a label in every sample. "
            "Convert .tiff to JPEG, PNG or WebP.",
        ),
        (
            ["a.jpg", "a.cls", "b.jpg", "b.json"],
            "a.tar: labels in both .cls and .json. Use one of them throughout.",
        ),
    ],
)
def test_a_shard_that_cannot_be_trained_on_says_which_sample(tmp_path, names, message):
    """With what was found in its place."""
    shard = write_tar(tmp_path / "a.tar", [(name, b"0") for name in names])

    with pytest.raises(ShardError) as error:
        list(scan_shard(shard, read_samples(shard)))

    assert str(error.value) == f"{tmp_path}{os.sep}{message}"
