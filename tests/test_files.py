"""A file is replaced whole or stays as it was, whatever others left or do next to it."""

import os
import threading

import pytest

from wds_convnext.files import replacing, write_atomically


def test_a_file_is_replaced_when_the_context_ends(tmp_path):
    """Until then the old content is read; no temporary file stays."""
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with replacing(path) as file:
        file.write(b"new")
        before = path.read_bytes()

    assert (before, path.read_bytes()) == (b"old", b"new")
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    """Also an interrupt; no temporary file stays."""
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    """The last to end wins, with its own content whole."""
    path = tmp_path / "a.json"

    with replacing(path) as one:
        one.write(b"one")
        with replacing(path) as other:
            other.write(b"the other")
        one.write(b" whole")

    assert path.read_bytes() == b"one whole"


def test_what_a_kill_left_behind_is_not_in_the_way(tmp_path):
    """A temporary file of version 0.1.0, whose names were fixed."""
    (tmp_path / "a.json.tmp").write_bytes(b"half")

    write_atomically(tmp_path / "a.json", b"new")

    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert (tmp_path / "a.json.tmp").read_bytes() == b"half"


def test_an_atomic_write_is_never_seen_half_done(tmp_path):
    """A reader beside the writer sees one content or the other, whole."""
    path = tmp_path / "train.json"
    contents = [b"a" * 300_000, b"b" * 500_000]
    write_atomically(path, contents[0])
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    num_writes = 0
    while watcher.is_alive() and (num_writes < 20 or len(set(seen)) < 2):  # however busy the CPU is
        num_writes += 1
        write_atomically(path, contents[num_writes % 2])
    done.set()
    watcher.join()

    assert set(seen) == set(contents)
    assert os.listdir(tmp_path) == ["train.json"]
