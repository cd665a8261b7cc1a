"""A conversion on several machines gives the bytes of a conversion on one."""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from conftest import HANG_S
from parquet_sets import image_table, read_folder, sorted_rows, write_split
from test_conversion import ENVIRONMENT, convert

from wds_convnext.check.index import index
from wds_convnext.check.verify import verify
from wds_convnext.conversion import parts
from wds_convnext.errors import DataError, UsageError, WdsConvnextError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    table = image_table(*sorted_rows(400))
    write_split(folder, "train", table, num_files=4, row_group_size=20)
    write_split(folder, "validation", image_table(*sorted_rows(30)), num_files=2)
    return str(folder)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """By kind of order, what one process writes."""
    folders = {shuffle: tmp_path_factory.mktemp("whole") for shuffle in (False, True)}
    for shuffle, out in folders.items():
        convert(source, out, num_shards=7, shuffle=shuffle)
    return {shuffle: read_folder(out) for shuffle, out in folders.items()}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE_S", 0.2)


@pytest.fixture
def small_units(monkeypatch):
    """Several spill files of little data."""
    from wds_convnext.conversion import layout

    monkeypatch.setattr(layout, "UNIT_BYTES", 20_000)


def start_part(part, source, out, **options):
    """A process that does a part, with several spill files of little data."""
    call = f"convert({source!r}, out={str(out)!r}, part={part!r}, jobs=1, quiet=True, **{options})"
    code = f"""
from wds_convnext.conversion import convert, layout
layout.UNIT_BYTES = 20_000
{call}
"""
    return subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT)


@pytest.mark.parametrize("shuffle", [False, True])
def test_parts_at_once_and_then_finish_give_the_bytes_of_one_process(
    source, whole, tmp_path, small_units, shuffle
):
    """Three processes; none publishes."""
    options = {"num_shards": 7, "shuffle": shuffle}
    processes = [start_part(f"{n}/3", source, tmp_path, **options) for n in (1, 2, 3)]
    assert [process.wait(timeout=HANG_S) for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("*.json"))

    convert(source, tmp_path, finish=True, **options)

    assert read_folder(tmp_path) == whole[shuffle]


def test_a_part_does_what_others_that_have_died_should_have_done(
    source, whole, tmp_path, impatient, small_units
):
    """Part 2 never runs: the passes are complete all the same; its shards are missing by number."""
    options = {"num_shards": 7}
    report = convert(source, tmp_path, part="1/2", **options)

    assert str(report).splitlines()[0] == "train: part 1/2 is done"
    with pytest.raises(WdsConvnextError, match=r"train: collect: 3 of 7 steps .*: 2, 4, 6\. "):
        convert(source, tmp_path, finish=True, **options)
    convert(source, tmp_path, part="2/2", **options)
    convert(source, tmp_path, finish=True, **options)

    assert read_folder(tmp_path) == whole[True]


def test_without_finish_the_same_command_does_what_is_missing(source, whole, tmp_path, impatient):
    convert(source, tmp_path, part="2/3", num_shards=7)

    convert(source, tmp_path, num_shards=7)

    assert read_folder(tmp_path) == whole[True]


@pytest.mark.slow
def test_parts_killed_at_random_moments_and_started_again_give_the_same_bytes(
    source, whole, tmp_path, small_units
):
    rng, running = random.Random(0), {}
    for _ in range(8):
        for number in (1, 2):
            if number not in running or running[number].poll() is not None:
                running[number] = start_part(f"{number}/2", source, tmp_path, num_shards=7)
        time.sleep(rng.uniform(0.5, 2.5))
        victim = running[rng.choice((1, 2))]
        victim.kill()
        assert victim.wait() in (0, -signal.SIGKILL)
    for number in (1, 2):
        running[number].kill()
    last = [start_part(f"{number}/2", source, tmp_path, num_shards=7) for number in (1, 2)]
    assert [process.wait(timeout=HANG_S) for process in last] == [0, 0]
    convert(source, tmp_path, finish=True, num_shards=7)

    assert read_folder(tmp_path) == whole[True]


def test_a_part_of_another_plan_is_refused_while_others_are_at_work(source, tmp_path):
    """Nothing that they have done is touched."""
    waiting = start_part("1/2", source, tmp_path, num_shards=7)
    deadline = time.monotonic() + HANG_S
    while not list(tmp_path.glob("train.partial/*.labels*.done")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        with pytest.raises(UsageError, match="other options"):
            convert(source, tmp_path, part="2/2", num_shards=6, overwrite=True)
        with pytest.raises(UsageError, match="another conversion is at work"):
            convert(source, tmp_path, num_shards=7)
        assert waiting.poll() is None
    finally:
        waiting.kill()
        waiting.wait()


def test_finish_of_nothing_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="nothing of train is begun"):
        convert(source, tmp_path, finish=True)
    convert(source, tmp_path, num_shards=7)
    with pytest.raises(UsageError, match="nothing of train is begun"):
        convert(source, tmp_path, finish=True, num_shards=6, overwrite=True)


@pytest.mark.parametrize("shuffle", [False, True])
def test_any_executor_gives_the_bytes_of_one_process(source, whole, tmp_path, shuffle):
    """Threads and processes of the standard library; also of verify and index."""
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2) as processes:
        convert(source, tmp_path / "a", num_shards=7, shuffle=shuffle, executor=threads)
        convert(source, tmp_path / "b", num_shards=7, shuffle=shuffle, executor=processes)
        assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b") == whole[shuffle]
        assert not verify(str(tmp_path / "a"), against=source, executor=threads).problems
        index(str(tmp_path / "b"), executor=threads, quiet=True)


def test_what_a_task_raises_on_an_executor_comes_out(tmp_path):
    """A bad image is its own line; a broken executor another."""
    write_split(tmp_path / "in", "train", image_table([b"no image"] * 4, [0, 1, 0, 1]))
    source = str(tmp_path / "in")
    with (
        ThreadPoolExecutor(2) as threads,
        pytest.raises(DataError, match="4 of 4 rows are unusable"),
    ):
        convert(source, tmp_path / "out", executor=threads)
    with pytest.raises(WdsConvnextError, match=r"the engine failed \(RuntimeError: cannot sched"):
        convert(source, tmp_path / "out", executor=threads)
