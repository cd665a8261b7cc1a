"""A conversion is never half done, whatever ends it and whatever stands in its folder."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_until
from parquet_sets import (
    encode,
    image_table,
    read_folder,
    sorted_rows,
    write_small_source,
    write_split,
)
from test_conversion import (
    ENVIRONMENT,
    TESTS,
    convert,
    expected_samples,
    samples_of,
    start_process,
)

from wds_convnext.errors import ShardError, UsageError, WdsConvnextError
from wds_convnext.shards.opening import open_dataset


@pytest.fixture
def source(tmp_path):
    return write_small_source(tmp_path / "tiny")


@pytest.mark.parametrize(
    "how",
    [
        "again",
        pytest.param("fresh", marks=pytest.mark.slow),
        pytest.param("replace", marks=pytest.mark.slow),
    ],
)
def test_dying_before_any_change_to_the_disk_leaves_nothing_that_reads_as_whole(tmp_path, how):
    """Dead at every moment in turn: unreadable or complete; then finished, with equal bytes."""
    write_split(tmp_path / "in", "train", image_table(*sorted_rows(24)), num_files=2)
    convert(str(tmp_path / "in"), tmp_path / "straight", num_shards=3)
    convert(str(tmp_path / "in"), tmp_path / "old", num_shards=5, seed=1)

    command = [sys.executable, TESTS / "crash.py", tmp_path / "in", tmp_path / "out", how]
    command += [tmp_path / "old"] if how == "replace" else []
    printed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)

    lines = printed.stdout.splitlines()
    expected = {"9 unfinished", "9 24 samples", "0 24 samples"}
    assert set(lines) == expected | ({"after 24 samples"} if how != "again" else set())
    assert lines.count("9 unfinished") > 5
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")


@pytest.mark.slow
def test_killed_at_random_moments_with_several_jobs_it_finishes_with_equal_bytes(tmp_path):
    """kill -9 of the parent process alone; its workers end by themselves; then the same again."""
    table = image_table(*sorted_rows(3000))
    write_split(tmp_path / "in", "train", table, num_files=4, row_group_size=100)
    source, out = str(tmp_path / "in"), tmp_path / "out"
    convert(source, tmp_path / "straight", num_shards=40)
    straight = read_folder(tmp_path / "straight")
    num_unfinished = 0

    def num_done():
        """Steps of the conversion that are finished: files read, shards written."""
        return len(list(out.glob("train.partial/*.done")))

    for num_more in random.Random(0).choices(range(10), k=6):
        enough = num_done() + num_more
        process = start_process(source, out, num_shards=40, jobs=3)
        while process.poll() is None and (num_done() < enough or not out.exists()):
            time.sleep(0.01)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        if (out / "train.json").exists():
            shards = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
            assert shards == straight
            shutil.rmtree(out)
        else:
            num_unfinished += (out / "train.partial").exists()
            with pytest.raises(ShardError):
                open_dataset(f"{out}/train-*.tar")
    assert num_unfinished > 2
    assert start_process(source, out, num_shards=40, jobs=3).wait() == 0

    assert read_folder(out) == straight


def test_finished_shards_are_not_written_again(tmp_path):
    """A stop at the third shard: the first two keep their files."""
    images, labels = sorted_rows(8)
    images[6] = encode(6, size=(300, 300))
    write_split(tmp_path / "in", "train", image_table(images, labels))
    source, out = str(tmp_path / "in"), tmp_path / "out"
    options = {"num_shards": 4, "shuffle": False}
    limit_file_size(30_000, lambda: convert(source, out, **options))
    finished = {os.stat(path.with_suffix("")).st_ino for path in out.rglob("*.tar.*.part.done")}

    convert(source, out, **options)

    assert len(finished) == 3
    assert finished < {path.stat().st_ino for path in out.glob("*.tar")}


def limit_file_size(num_bytes, action):
    """Run an action that fails because no file can grow beyond a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with pytest.raises(WdsConvnextError) as caught:
            action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_full_disk_is_one_line_and_the_conversion_can_be_finished(source, tmp_path, shuffle):
    """Nothing reads as complete, the input is untouched, and the same command goes on."""
    before = read_folder(source)
    convert(source, tmp_path / "straight", shuffle=shuffle)
    out = tmp_path / "out"

    message = limit_file_size(20_000, lambda: convert(source, out, shuffle=shuffle))

    assert re.search(r"File too large.*run the same command again", message)
    assert "\n" not in message
    assert not list(out.glob("train*.tar"))
    assert not (out / "train.json").exists()
    assert read_folder(source) == before
    convert(source, out, shuffle=shuffle)
    assert read_folder(out) == read_folder(tmp_path / "straight")


def test_a_folder_that_cannot_be_made_is_one_line(source, tmp_path):
    """OUT below a file."""
    (tmp_path / "file").write_text("")

    with pytest.raises(WdsConvnextError, match=r"file.*Not a directory"):
        convert(source, tmp_path / "file" / "out")


def test_a_disk_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    """With the shuffle about twice the input is needed."""
    usage = shutil.disk_usage(tmp_path)._replace(free=60_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    with pytest.raises(UsageError, match=r"0\.0 GB are free.*--no-shuffle"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_running_again_changes_nothing(source, tmp_path):
    """A second run finds the splits complete, and leaves the files alone."""
    convert(source, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")}

    report = convert(source, tmp_path)

    assert all(split.already_complete for split in report.splits)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")} == written


def test_other_options_are_refused_unless_overwrite(source, tmp_path):
    """Into a complete folder or a begun one; overwriting leaves what a fresh run would."""
    out = tmp_path / "out"
    convert(source, out, num_shards=5)
    before = read_folder(out)

    with pytest.raises(UsageError, match="holds test with other options.*--overwrite"):
        convert(source, out, num_shards=2)
    assert read_folder(out) == before

    convert(source, out, num_shards=2, overwrite=True)
    convert(source, tmp_path / "fresh", num_shards=2)
    assert read_folder(out) == read_folder(tmp_path / "fresh")


def test_another_input_is_other_options(source, tmp_path):
    """A file that has changed since is noticed, though its name is the same."""
    convert(source, tmp_path / "out")
    write_split(source, "test", image_table(*sorted_rows(8, start=200)))

    with pytest.raises(UsageError, match="from other files"):
        convert(source, tmp_path / "out")


def test_other_class_numbers_are_other_options(tmp_path):
    """String labels are numbered over all splits: a new split may shift those of the first."""
    source = tmp_path / "in"
    for split, names in (("train", ["bee", "cat"]), ("test", ["ant", "cat"])):
        table = image_table([encode(0), encode(1)], names, class_names=None)
        write_split(source, split, table)
    convert(f"{source}/train-*", tmp_path / "out")

    with pytest.raises(UsageError, match="holds train with other options"):
        convert(str(source), tmp_path / "out")


def test_what_others_wrote_is_never_replaced_or_deleted(source, tmp_path):
    """Foreign shards of our names stop the conversion, also with --overwrite; others stay."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-001.tar").write_bytes(b"somebody's")
    (out / "notes.txt").write_text("mine")
    (out / "train-999.tar").write_text("also mine")
    before = read_folder(out)

    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"train-001.tar: not written by this tool"):
            convert(f"{source}/train-*", out, overwrite=overwrite)
        assert read_folder(out) == before

    (out / "train-001.tar").unlink()
    convert(f"{source}/train-*", out, num_shards=4)
    convert(f"{source}/train-*", out, num_shards=2, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "train-999.tar").read_text() == "also mine"
    assert not (out / "train-002.tar").exists()


def test_a_missing_shard_of_a_complete_folder_is_an_error(source, tmp_path):
    """The manifest stays, so it is not silently incomplete; --overwrite mends it."""
    convert(source, tmp_path)
    (tmp_path / "train-001.tar").unlink()

    with pytest.raises(ShardError, match=r"train-001.tar: missing or changed"):
        convert(source, tmp_path)
    convert(source, tmp_path, overwrite=True)
    assert sorted(samples_of(tmp_path)) == expected_samples(40)


def test_two_conversions_into_one_folder_exclude_each_other(source, tmp_path, monkeypatch):
    """The second one says so."""
    from wds_convnext.conversion import staging

    monkeypatch.setattr(staging, "_LOCK_WAIT_S", 0.1)
    other = staging.Staging(tmp_path, "test")
    other.begin({}, [])

    with pytest.raises(UsageError, match="another conversion is at work|other options"):
        convert(source, tmp_path, overwrite=True)
    other.remove()


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_the_conversion_can_be_finished(tmp_path):
    """As when the system runs out of memory."""
    table = image_table(*sorted_rows(3000))
    write_split(tmp_path / "in", "train", table, num_files=4, row_group_size=100)
    source, out = str(tmp_path / "in"), tmp_path / "out"
    process = start_process(source, out, num_shards=40, jobs=2, stderr=subprocess.PIPE)
    wait_until(lambda: any(out.glob("train.partial/*.done")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]

    os.kill(int(workers[0]), signal.SIGKILL)
    message = process.communicate()[1].decode().splitlines()[-1]

    assert "a worker process was killed" in message
    assert "Run the same command again" in message
    convert(source, out, num_shards=40)
    convert(source, tmp_path / "straight", num_shards=40)
    assert read_folder(out) == read_folder(tmp_path / "straight")
