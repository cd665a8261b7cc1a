"""A walk over tar headers finds what `tarfile` finds; what is forged is an error of one line."""

import io
import tarfile
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.errors import ShardError
from wds_convnext.shards.headers import BLOCK, walk_headers
from wds_convnext.shards.tar import walk_tar

NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=130
)
TYPES = [tarfile.REGTYPE, tarfile.CONTTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE]
MEMBERS = st.lists(
    st.tuples(NAMES, st.sampled_from(TYPES), st.integers(0, 1500)), min_size=1, max_size=6
)


def walk(data: bytes) -> list:
    return list(walk_headers(lambda num_bytes, at: data[at : at + num_bytes]))


@given(members=MEMBERS, format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_a_walk_finds_what_tarfile_finds(members, format):
    """Names, types and places, also of links and folders, and of names of any length."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, kind, num_bytes in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            info.size = num_bytes if info.isreg() else 0
            tar.addfile(info, io.BytesIO(bytes([65]) * info.size))
    file.seek(0)

    found = [(h.name.rstrip("/"), h.type, h.start, h.offset, h.num_bytes)
             for h in walk(file.getvalue())]  # fmt: skip

    with tarfile.open(fileobj=file) as tar:
        assert found == [
            (info.name.rstrip("/"), info.type, info.offset, info.offset_data, info.size)
            for info in tar
        ]


def header(name="a.jpg", *, size=b"00000000005", kind=b"0") -> bytes:
    """A header with a right checksum, whatever its other fields say."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extension(data: bytes, kind=b"x") -> bytes:
    return header(size=b"%011o" % len(data), kind=kind) + data.ljust(-(-len(data) // 512) * 512)


FORGED = {
    "a negative size, octal": header(size=b"-0000002000"),
    "a negative size, base 256": header(size=b"\xff" * 10 + b"\xfe\x00"),
    "a size with a sign": header(size=b"+0000000005"),
    "an extension header of 9 GB": header(size=b"\x80\0\0\0\0\0\0\2\x18\x71\x1a\0", kind=b"L"),
    "an extension header of 2 GB": header(size=b"17777777777", kind=b"x"),
    "20,000 extension headers": extension(b"10 path=a\n") * 20_000,
    "a pax length of many digits": extension(b"9" * 100_000 + b" path=a\n"),
    "a pax length of zero": extension(b"0 path=a\n"),
    "a pax length that is short": extension(b"3 path=a\n"),
    "a pax header without a key": extension(b"=" * 50_000),
    "a pax header without an end": extension(b"12 " + b"p" * 100_000),
    "a pax size that is negative": extension(b"12 size=-512\n"),
    "a pax size of many digits": extension(b"5015 size=" + b"9" * 5004 + b"\n"),
    "a pax size for all members": extension(b"10 size=5\n", kind=b"g"),
    "a sparse file, pax": extension(b"22 GNU.sparse.major=1\n"),
    "a sparse map, pax": extension(b"24 GNU.sparse.map=1,x,3\n"),
    "a sparse file, old": header(kind=b"S"),
    "a V7 header": None,
    "an extension header alone": extension(b"10 path=a\n") + bytes(2 * BLOCK),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_forged_header_is_one_line_at_once(tmp_path, forged, is_first):
    """Whatever number it states decides neither time nor memory."""
    content = FORGED[forged]
    if content is None:
        block = bytearray(header())
        block[257:265] = bytes(8)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        content = bytes(block)
    good = header("a.cls") + b"3".ljust(BLOCK, b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes((b"" if is_first else good) + content + good + bytes(2 * BLOCK))
    tracemalloc.start()
    started = time.monotonic()

    with pytest.raises(ShardError, match=r"a.tar: [^\n]*\.$"):
        list(walk_tar(str(path)))

    assert time.monotonic() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@given(data=st.data())
def test_no_header_of_noise_is_more_than_an_error(data, tmp_path_factory):
    """Fields of any bytes, with a right checksum."""
    path = tmp_path_factory.getbasetemp() / "noise.tar"
    size, kind = data.draw(st.binary(max_size=12)), data.draw(st.binary(min_size=1, max_size=1))
    payload = data.draw(st.binary(max_size=600))
    good = header("a.cls") + b"3".ljust(BLOCK, b"\0")
    path.write_bytes(header(size=size, kind=kind) + payload.ljust(1024, b"\0") + good + bytes(1024))

    try:
        samples = list(walk_tar(str(path)))
    except ShardError as error:
        assert "\n" not in str(error)
    else:
        assert all(member.num_bytes >= 0 for sample in samples for member in sample)


def test_a_tar_that_tarfile_reads_holds_the_same_samples(tmp_path):
    """pax headers with other keys, of bytes that are not text, change nothing."""
    path = tmp_path / "a.tar"
    xattr = b"35 SCHILY.xattr.user.x=\xff\xfe=\n\n\0four\n"
    other = b"20 hdrcharset=BINARY\n"
    path.write_bytes(
        extension(b"%d%s" % (len(xattr), xattr[2:]))
        + header("a.jpg") + b"image".ljust(BLOCK, b"\0")
        + extension(b"%d%s" % (len(other), other[2:]), kind=b"g")
        + header("a.cls", size=b"1") + b"3".ljust(3 * BLOCK, b"\0")
    )  # fmt: skip

    ((image, label),) = walk_tar(str(path))

    assert (image.name, image.num_bytes, label.name, label.num_bytes) == ("a.jpg", 5, "a.cls", 1)
