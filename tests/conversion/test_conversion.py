"""Conversion keeps every row, gives the same bytes always, and is never half done."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import wait_until
from parquet_sets import encode, image_table, read_folder, read_tar, sorted_rows, write_split

import wds_convnext.conversion
from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, ShardError, UsageError, WdsConvnextError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader

TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS.parent)}


@pytest.fixture
def source(tmp_path):
    """40 training rows in 3 files and 8 test rows in one, sorted by class."""
    folder = tmp_path / "tiny"
    write_split(folder, "train", image_table(*sorted_rows(40)), num_files=3)
    write_split(folder, "test", image_table(*sorted_rows(8, start=100)))
    return str(folder)


def convert(source, out, **options):
    options = {"jobs": 1} | options
    return wds_convnext.conversion.convert(source, out=out, quiet=True, **options)


def samples_of(out, split="train"):
    return [
        sample for path in sorted(Path(out).glob(f"{split}-*.tar")) for sample in read_tar(path)
    ]


def expected_samples(num_rows, start=0):
    images, labels = sorted_rows(num_rows, start=start)
    return [(f"{row:09d}", images[row], labels[row]) for row in range(num_rows)]


def start_process(source, out, stderr=subprocess.DEVNULL, **options):
    call = f"convert({source!r}, out={str(out)!r}, **{options})"
    code = f"from wds_convnext.conversion import convert; {call}"
    return subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {code}"],
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=stderr,
    )


def test_there_is_a_shard_for_every_file_a_sidecar_for_every_shard_and_a_manifest(tmp_path):
    """With mini-imagenet's 13, 3 and 2 files: train-000..012, validation-000..002, …"""
    for split, num_files in (("train", 13), ("validation", 3), ("test", 2)):
        write_split(tmp_path / "in/data", split, image_table(*sorted_rows(26)), num_files=num_files)

    report = convert(str(tmp_path / "in"), tmp_path / "out")

    names = [
        f"{split}-{i:03d}{extension}"
        for split, num_files in (("test", 2), ("train", 13), ("validation", 3))
        for i in range(num_files)
        for extension in (".idx", ".tar")
    ]
    names += [f"{s}.{kind}" for s in ("test", "train", "validation") for kind in ("json", "index")]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    assert {split.split: split.num_samples for split in report.splits} == {
        "test": 26, "train": 26, "validation": 26,
    }  # fmt: skip
    assert read_manifest(tmp_path / "out/train.json").name == "in"


def test_in_stored_order_every_row_is_there_once_in_its_place(source, tmp_path):
    """Same bytes, same labels, row numbers as keys, one file after the other."""
    convert(source, tmp_path / "out", shuffle=False)

    assert samples_of(tmp_path / "out") == expected_samples(40)
    assert samples_of(tmp_path / "out", "test") == expected_samples(8, start=100)


def test_shuffled_every_row_is_there_once_and_classes_are_mixed(source, tmp_path):
    """A permutation of the training rows; each shard a fair sample; the test split as stored."""
    convert(source, tmp_path / "out")

    samples = samples_of(tmp_path / "out")
    assert sorted(samples) == expected_samples(40)
    assert samples != expected_samples(40)
    shards = [read_tar(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    assert sorted(map(len, shards)) == [13, 13, 14]
    for shard in shards:
        counts = Counter(label for _, _, label in shard)
        assert len(counts) == 4
        assert set(counts.values()) <= {3, 4}
    assert samples_of(tmp_path / "out", "test") == expected_samples(8, start=100)


def test_our_reader_reads_what_was_written(source, tmp_path):
    """Offsets, labels, sizes and checksums of manifest and sidecars fit the shards."""
    convert(source, tmp_path / "out")

    dataset = open_dataset(str(tmp_path / "out/train.json"))

    reader = SampleReader(dataset)
    read = [reader.read(number) for number in range(len(dataset))]
    assert dataset.index.has_checksums
    assert read == [(image, label) for _, image, label in samples_of(tmp_path / "out")]
    assert dataset.class_names == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"num_shards": 5}])
def test_the_bytes_do_not_depend_on_jobs_time_or_the_folder(source, tmp_path, options):
    """One process or two, today or tomorrow, here or there: equal files."""
    convert(source, tmp_path / "one", **options)
    moved = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(source, moved)
    for path in moved.iterdir():
        os.utime(path, (0, 0))

    convert(str(moved), tmp_path / "two", jobs=2, **options)

    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")


def test_the_seed_decides_the_order(source, tmp_path):
    """Another seed, another order, of the same samples."""
    for seed in (0, 1):
        convert(source, tmp_path / str(seed), seed=seed)

    zero, one = (samples_of(tmp_path / str(seed)) for seed in (0, 1))
    assert zero != one
    assert sorted(zero) == sorted(one)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("option", "value", "sizes"),
    [
        ("num_shards", 1, [40]),
        ("num_shards", 7, [5, 5, 6, 6, 6, 6, 6]),
        ("samples_per_shard", 15, [13, 13, 14]),
        ("samples_per_shard", 10, [10, 10, 10, 10]),
        ("shard_size", 50_000, [13, 13, 14]),
    ],
)
def test_sizes_are_as_asked(source, tmp_path, option, value, sizes, shuffle):
    """Shards differ by at most one sample; none has more samples than asked for."""
    source = f"{source}/train-*.parquet"

    (report,) = convert(source, tmp_path, shuffle=shuffle, **{option: value}).splits

    assert sorted(shard.num_samples for shard in report.shards) == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 2, "shard_size": 3}, "--num-shards and --shard-size exclude each other"),
        ({"num_shards": 0}, "--num-shards 0: expected an integer >= 1."),
        ({"num_shards": 41}, "41 shards for 40 rows of train"),
    ],
)
def test_options_that_make_no_sense_are_refused(source, tmp_path, options, message):
    """Before anything is written."""
    with pytest.raises(UsageError, match=message):
        convert(f"{source}/train-*", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


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

    for num_more in random.Random(0).choices(range(10), k=10):
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
    finished = {os.stat(path.with_suffix("")).st_ino for path in out.rglob("*.tar.part.done")}

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


@pytest.fixture
def flawed(tmp_path):
    """20 rows, five of them unusable, each in its way; the list of (row, reason)."""
    images, labels = sorted_rows(20)
    images[2], images[5], images[7], images[11] = b"", None, b"<html>", images[11][:200]
    labels[13] = None
    write_split(tmp_path / "flawed", "train", image_table(images, labels), num_files=2)
    reasons = {2: "empty", 5: "null", 7: "not an image", 11: "cut short|decode", 13: "label"}
    return str(tmp_path / "flawed"), reasons


@pytest.mark.parametrize("shuffle", [False, True])
def test_unusable_rows_are_an_error_that_lists_all_of_them(flawed, tmp_path, shuffle):
    """By default nothing reads as complete, and the list names file, row and reason."""
    source, reasons = flawed

    with pytest.raises(DataError, match=r"5 of 20 rows are unusable.*--on-bad skip") as caught:
        convert(source, tmp_path / "out", shuffle=shuffle)

    listing = re.search(r"listed in (\S+)\. ", str(caught.value))[1]
    listed = [json.loads(line) for line in Path(listing).read_text().splitlines()]
    assert [entry["row"] for entry in listed] == list(reasons)
    for entry, reason in zip(listed, reasons.values()):
        assert re.search(reason, entry["reason"])
    assert (listed[-1]["file"], listed[-1]["row_in_file"]) == ("train-00001-of-00002.parquet", 3)
    assert not (tmp_path / "out/train.json").exists()


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_unusable_rows_are_left_out_and_listed_on_request(flawed, tmp_path, shuffle, jobs):
    """Also after an error; keys stay row numbers; shuffled shards still differ by at most one."""
    source, reasons = flawed
    out = tmp_path / "out"
    with pytest.raises(DataError):
        convert(source, out, shuffle=shuffle)

    (report,) = convert(source, out, shuffle=shuffle, on_bad="skip", jobs=jobs).splits

    kept = [sample for sample in expected_samples(20) if int(sample[0]) not in reasons]
    assert sorted(samples_of(out)) == kept
    assert sum(report.skipped.values()) == 5
    assert len((out / "train.bad.jsonl").read_text().splitlines()) == 5
    (again,) = convert(source, out, shuffle=shuffle).splits
    assert again.already_complete
    assert again.skipped == report.skipped
    if shuffle:
        assert sorted(shard.num_samples for shard in report.shards) == [7, 8]


@pytest.mark.parametrize("labels", [[-1] * 5, [None] * 5, None])
def test_a_split_without_labels_is_left_out_and_said(tmp_path, labels):
    """The test split of a benchmark: all -1, all null, or no such column; others convert."""
    images = [encode(i) for i in range(5)]
    write_split(tmp_path / "in", "train", image_table(images, [0, 1, 2, 3, 0]))
    table = image_table(images, pa.array(labels or [0] * 5, pa.int64()))
    write_split(tmp_path / "in", "test", table if labels else table.drop_columns("label"))

    report = convert(tmp_path / "in", tmp_path / "out")

    assert [split.split for split in report.splits] == ["train"]
    assert "test: left out, " in str(report)
    assert "columns: images from image, labels from label" in str(report)
    assert not list((tmp_path / "out").glob("test*"))
    found = verify(str(tmp_path / "out"), against=str(tmp_path / "in"), jobs=1, quiet=True)
    assert found.problems == ()


def test_a_training_split_without_labels_is_an_error(tmp_path):
    """It is never left out for the sake of a test split."""
    images = [encode(i) for i in range(3)]
    write_split(tmp_path / "in", "train", image_table(images, [-1, -1, -1]))
    write_split(tmp_path / "in", "test", image_table(images, [0, 1, 2]))

    with pytest.raises(DataError, match="train cannot be used: none of its 3 rows has a label"):
        convert(tmp_path / "in", tmp_path / "out")


def test_advice_names_no_test_split(tmp_path):
    """Whatever is larger."""
    images = [encode(i) for i in range(4)]
    write_split(tmp_path / "in", "mydata_test", image_table(images, [0, 1, 2, 3]))
    alone = convert(tmp_path / "in", tmp_path / "alone")
    write_split(tmp_path / "in", "mydata_train", image_table(images[:1], [0]))

    both = convert(tmp_path / "in", tmp_path / "both")

    assert "train --shards" not in str(alone)
    assert f"train --shards {tmp_path}/both/mydata_train.json" in str(both)
    assert [key for key, _, _ in read_tar(tmp_path / "both" / "mydata_test-000.tar")] == [
        f"{row:09d}" for row in range(4)
    ]


def test_all_formats_keep_their_extension_and_are_reported(tmp_path):
    """The report counts formats, modes, and what a reader may trip over."""
    formats = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]
    images = [encode(i, image_format) for i, image_format in enumerate(formats)]
    images.append(encode(9, "JPEG", mode="CMYK"))
    write_split(tmp_path / "in", "train", image_table(images, [0] * 6))

    report = convert(str(tmp_path / "in"), tmp_path / "out", shuffle=False)

    (split,) = report.splits
    assert split.survey.formats == {"jpg": 2, "png": 1, "webp": 1, "bmp": 1, "gif": 1}
    assert split.survey.unusual["mode CMYK"] == 1
    assert "train: 6 samples, 4 classes, 1 shard, " in str(report)
    assert "next: wds-convnext verify" in str(report)
    dataset = open_dataset(str(tmp_path / "out/train.json"))
    assert SampleReader(dataset).read(2) == (images[2], 0)


def test_a_pillow_decode_finds_what_the_header_hides(tmp_path):
    """--check decode."""
    damaged = bytearray(encode(1, "PNG", size=(64, 64)))
    damaged[len(damaged) // 2] ^= 0xFF
    write_split(tmp_path / "in", "train", image_table([encode(0), bytes(damaged)], [0, 1]))

    with pytest.raises(DataError, match="1 of 2 rows are unusable"):
        convert(str(tmp_path / "in"), tmp_path / "out", check="decode")


def test_check_decode_judges_a_jpeg_as_training_does(tmp_path):
    """Bytes left over before the end are harmless; pixels that were never decoded are not."""
    whole = encode(0, size=(64, 64))
    left_over, torn = whole[:-2] + b"left over" + whole[-2:], whole[: len(whole) // 2] + whole[-2:]
    write_split(tmp_path / "in", "train", image_table([left_over, torn], [0, 1]))

    with pytest.raises(DataError, match=r"1 of 2 rows .* row 1 of .*does not decode \(Corrupt"):
        convert(str(tmp_path / "in"), tmp_path / "out", check="decode")


def test_a_vanished_input_is_one_line(source, tmp_path, monkeypatch):
    """A file deleted after its footer was read."""
    from wds_convnext import conversion as module

    find_class_names = module.find_class_names

    def vanish(splits, **options):
        Path(source, "train-00001-of-00003.parquet").unlink()
        return find_class_names(splits, **options)

    monkeypatch.setattr(module, "find_class_names", vanish)

    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: not readable"):
        convert(source, tmp_path / "out")


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


def test_conversion_has_no_use_for_torch():
    """Importing it takes neither torch nor webdataset, which would double the memory."""
    code = "import sys, wds_convnext.conversion; print({'torch', 'webdataset'} & set(sys.modules))"
    command = [sys.executable, "-c", code]

    printed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)

    assert printed.stdout.strip() == "set()"
