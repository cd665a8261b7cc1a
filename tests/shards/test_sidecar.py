"""Sidecars: wds2idx's text, equal to a walk of the tar, and what is none of it."""

from pathlib import Path

import pytest
from conftest import sample_members, write_tar
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.errors import ShardError
from wds_convnext.shards.sidecar import format_sidecar, read_samples, read_sidecar, sidecar_path
from wds_convnext.shards.tar import Member, walk_tar

LONG = "folder/" + "k" * 140


def test_a_sidecar_is_wds2idx_text():
    """One golden text in the format of DALI's wds2idx, version 1.2."""
    samples = [
        [Member("000000000.jpg", 512, 1300), Member("000000000.cls", 2560, 1)],
        [Member("dir/b.cls", 3584, 2), Member("dir/b.seg.png", 4608, 70)],
    ]

    assert format_sidecar(samples) == (
        b"v1.2 2\n"
        b"jpg 512 1300 000000000.jpg cls 2560 1 000000000.cls\n"
        b"cls 3584 2 dir/b.cls seg.png 4608 70 dir/b.seg.png\n"
    )


words = st.text(
    st.characters(exclude_categories=["Z", "Cc"], exclude_characters="./"), min_size=1, max_size=9
)
members = st.builds(
    lambda key, extension, offset, size: Member(f"{key}.{extension}", offset, size),
    words,
    words,
    st.integers(0, 2**50),
    st.integers(0, 2**40),
)


@given(samples=st.lists(st.lists(members, min_size=1, max_size=4), max_size=6))
def test_a_sidecar_reads_back_as_written(tmp_path_factory, samples):
    """Any names without whitespace, also those that are not UTF-8; any offsets and sizes."""
    path = tmp_path_factory.getbasetemp() / "roundtrip.idx"

    path.write_bytes(format_sidecar(samples))

    assert read_sidecar(path) == samples


def test_whitespace_in_names_becomes_an_underscore(tmp_path):
    """The format has no escape for it; in extensions, too."""
    path = tmp_path / "a.idx"

    path.write_bytes(format_sidecar([[Member("two words 1.5 mm.jpg", 512, 3)]]))

    assert read_sidecar(path) == [[Member("two_words_1.5_mm.jpg", 512, 3)]]


def test_the_sidecar_of_any_tar_equals_its_walk(tmp_path):
    """Members in any order, several images, long names."""
    members = [
        ("a.cls", b"1"),
        ("a.jpg", b"22"),
        ("a.txt", b""),
        (f"{LONG}.png", b"3"),
        ("c.json", b"{}"),
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    walked = list(walk_tar(shard))

    Path(sidecar_path(shard)).write_bytes(format_sidecar(walked))

    assert read_samples(shard) == walked


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1.2\n",
        "v1.2 one\n",
        "v1.1 0\n",
        "v1.2 2\njpg 512 3 a.jpg\n",
        "v1.2 1\njpg 512 3 a.jpg\njpg 1536 3 b.jpg\n",
        "v1.2 1\njpg 512 3\n",
        "v1.2 1\njpg 512 three a.jpg\n",
        "v1.2 1\n\n",
        "\0\0\0\0",
    ],
)
def test_what_is_no_whole_sidecar_is_refused(tmp_path, text):
    """Other versions, lines too few or too many, fields that are missing or no numbers."""
    path = tmp_path / "a.idx"
    path.write_text(text)

    with pytest.raises(ShardError) as error:
        read_sidecar(path)

    assert str(error.value).startswith(f"{path}: not a whole sidecar of version v1.2 (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "jpg 0 5 a.jpg",
        "jpg -512 5 a.jpg",
        "jpg 512 -5 a.jpg",
        "jpg 512 99999999999 a.jpg",
        "jpg 512 999999999999999999999999 a.jpg",
        "jpg 999999999999999999999999 5 a.jpg",
        "cls 1536 1 a.cls jpg 512 5 a.jpg",
        "jpg 512 5 a.jpg cls 512 1 a.cls",
    ],
)
def test_a_sidecar_that_points_outside_its_tar_is_refused(tmp_path, line):
    """Before anything is read at such an offset, or so much memory asked for."""
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"image"), ("a.cls", b"1")])
    (tmp_path / "a.idx").write_text(f"v1.2 1\n{line}\n")

    with pytest.raises(ShardError) as error:
        read_samples(shard)

    assert str(tmp_path / "a.") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sidecar_of_a_shard_that_grew_is_refused(tmp_path):
    """Without this the samples added since would be left out unseen."""
    shard = write_tar(tmp_path / "a.tar", sample_members(3))
    Path(sidecar_path(shard)).write_bytes(format_sidecar(list(walk_tar(shard))))
    write_tar(tmp_path / "a.tar", sample_members(5))

    with pytest.raises(ShardError, match="Delete its .idx"):
        read_samples(shard)
