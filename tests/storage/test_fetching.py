"""The cache of a process: one folder, one fetcher, whatever is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from stores import serving, write_store

from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import ShardError, UsageError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.storage.cache import caching
from wds_convnext.storage.layout import occupied, rounded
from wds_convnext.storage.schedule import Plan, simulate


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """20 shards of 2 samples, and a validation split."""
    return write_store(tmp_path_factory.mktemp("shards"), train=40, validation=4)


def options(folder, size=None, timeout_s=5.0):
    return RemoteConfig(cache_dir=str(folder / "cache"), cache_size=size, remote_timeout=timeout_s)


def tars(cache):
    return sorted(path.name for path in cache.path.glob("*/*.tar"))


def wait_for(is_reached, seconds=60):
    end = time.monotonic() + seconds
    while not is_reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def fetcher_of(cache):
    """The processes that serve a cache."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"storage.fetcher\0{cache.path}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_samples_are_those_of_the_local_shards(shards, tmp_path):
    """The same samples, labels and digest; only what was read was fetched."""
    local = open_dataset(str(shards / "train.json"))
    with serving(shards) as store, caching(options(tmp_path)) as cache:
        remote = open_dataset(f"{store.url}/train-<000..019>.tar")

        assert [remote[n] for n in (0, 7, 39)] == [local[n] for n in (0, 7, 39)]
        assert remote.digest == local.digest
        assert remote.shards[0].where == f"{store.url}/train-000.tar"
        assert tars(cache) == ["train-000.tar", "train-003.tar", "train-019.tar"]
        wait_for(lambda: cache.counts()[3] == 3)  # noted a moment after the last one is here
        fetched, *_, published, evicted = cache.counts()
        assert fetched >= 3 * local.shards[0].num_bytes and (published, evicted) == (3, 0)
    wait_for(lambda: not fetcher_of(cache))


def test_a_small_cache_serves_many_readers(shards, tmp_path):
    """Four readers in a cache of four shards: each sample is right, and the size is kept."""
    local = open_dataset(str(shards / "train.json"))
    numbers = np.random.default_rng(0).permutation(40)[:24].tolist()
    with serving(shards) as store, caching(options(tmp_path, 200_000)) as cache:
        remote = open_dataset(f"{store.url}/train.json")
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(remote.__getitem__, numbers))

        assert found == [local[number] for number in numbers]
        assert sum(occupied(str(path)) for path in cache.path.rglob("*")) <= 200_000
        assert cache.counts()[4] > 0


def test_a_fetcher_that_is_killed_is_started_again(shards, tmp_path, capfd):
    local = open_dataset(str(shards / "train.json"))
    with serving(shards) as store, caching(options(tmp_path)) as cache:
        remote = open_dataset(f"{store.url}/train.json")
        for number in (0, 10, 20):
            wait_for(lambda: fetcher_of(cache))
            killed = fetcher_of(cache)
            os.kill(killed[0], signal.SIGKILL)

            assert remote[number] == local[number]
            assert fetcher_of(cache) != killed
    assert capfd.readouterr().err.count("it is started again") == 3


def test_what_was_left_by_a_kill_serves_until_there_is_no_room(shards, tmp_path):
    """Parts of shards are deleted at once, others when room is needed, those of a split before it.

    The validation split is opened long after the fetcher has looked at what was left.
    """
    with serving(shards) as store:
        with caching(options(tmp_path)) as cache:
            open_dataset(f"{store.url}/train.json")[0]
            open_dataset(f"{store.url}/validation.json")[0]
            (folder,) = {path.parent for path in cache.path.glob("*/*.tar")}
        (folder / "train-005.tar.part").write_bytes(b"half")
        (folder / "old-00000.tar").write_bytes(bytes(100_000))
        asked = Counter(store.asked)

        with caching(options(tmp_path, 262_000)) as cache:
            dataset = open_dataset(f"{store.url}/train.json")
            wait_for(lambda: not (folder / "train-005.tar.part").exists())
            assert dataset[0] and open_dataset(f"{store.url}/validation.json")[0]
            for name in ("train-000.tar", "validation-000.tar"):
                assert store.asked[name] == asked[name] == 1
            assert (folder / "old-00000.tar").exists()

            assert all(dataset[number] for number in range(2, 20))
            assert not (folder / "old-00000.tar").exists()
            assert {"train-000.tar", "validation-000.tar"} & set(tars(cache))
            assert sum(occupied(str(path)) for path in cache.path.rglob("*")) <= 262_000


def test_a_second_process_has_a_folder_of_its_own(shards, tmp_path):
    program = (
        "import sys; from wds_convnext.storage.cache import *\n"
        "with caching(RemoteConfig(cache_dir=sys.argv[1])) as cache:\n"
        "    print(cache.path, cache.num_bytes > 0)"
    )
    with caching(options(tmp_path)) as cache:
        assert cache.path.name == "cache-0"

        command = [sys.executable, "-c", program, str(tmp_path / "cache")]
        other = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert other.strip().endswith("cache-1 True")


def test_a_plan_is_followed_ahead_of_the_reader(shards, tmp_path):
    """What is needed next is there before it is asked for, and what is needed last went."""
    with serving(shards) as store, caching(options(tmp_path, 262_000)) as cache:
        dataset = open_dataset(f"{store.url}/train.json")
        paths = [shard.path for shard in dataset.shards]
        uses = Plan.of(np.arange(20), np.arange(20), np.arange(20))
        cache.follow(uses, paths, start=0, num_ranks=2)
        wait_for(lambda: "train-004.tar" in tars(cache))
        clocks = [cache.clock(0), cache.clock(1)]

        clocks[0].report(15)
        clocks[1].report(10)  # the slower one counts
        wait_for(lambda: "train-019.tar" in tars(cache))

        gone = {f"train-{number:03d}.tar" for number in range(20)} - set(tars(cache))
        assert gone and max(gone) < "train-010.tar"
        assert max(store.asked[f"train-{number:03d}.tar"] for number in range(20)) == 1
        for clock in clocks:
            clock.close()


def test_fetching_ahead_costs_no_byte(shards, tmp_path):
    """However far ahead of the clock it fetches: no more objects than the best eviction does."""
    second = np.random.default_rng(3).permutation(20)
    uses = Plan.of(np.append(np.arange(20), second), np.arange(40), np.arange(40))
    with serving(shards) as store, caching(options(tmp_path, 262_000)) as cache:
        dataset = open_dataset(f"{store.url}/train.json")
        paths = [shard.path for shard in dataset.shards]
        cache.follow(uses, paths, start=0, num_ranks=1)
        clock = cache.clock(0)
        for time_, number in enumerate([*range(20), *second]):
            wait_for(lambda number=number: os.path.exists(paths[number]))
            time.sleep(0.03)  # in which it fetches ahead
            clock.report(time_ + 1)
        clock.close()
        wait_for(lambda: cache.counts()[3] >= 20)
        fetched, room = cache.counts()[3], cache.room

    sizes = np.array([rounded(shard.num_bytes) for shard in dataset.shards])
    assert 20 < fetched <= simulate(uses, sizes, room).sum()


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda folder: (folder / "train-002.tar").unlink(), "no such object .404."),
        (lambda folder: (folder / "train-002.tar").write_bytes(b"x"), "another than the man"),
    ],
)
def test_an_object_that_is_gone_or_changed_is_one_line(shards, tmp_path, spoil, reason):
    shutil.copytree(shards, tmp_path / "store")
    with serving(tmp_path / "store") as store, caching(options(tmp_path)):
        dataset = open_dataset(f"{store.url}/train.json")
        spoil(tmp_path / "store")
        with pytest.raises(ShardError, match=f"{store.url}/train-002.tar: .*{reason}"):
            dataset[4]


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("{url}/other.json", "other.json: no manifest with an index is there"),
        ("{url}/train-<018..021>.tar", "does not list train-020.tar, train-021.tar"),
        ("{url}/train-9*.tar", "does not list"),
        ("{url}/train", "no manifest with an index is there"),
        ("http://127.0.0.1:9/train.json", "no progress for 1 s"),
    ],
)
def test_specs_that_name_nothing_are_one_line(shards, tmp_path, spec, reason):
    with (
        serving(shards) as store,
        caching(options(tmp_path, timeout_s=1)),
        pytest.raises(ShardError, match=reason),
    ):
        open_dataset(spec.format(url=store.url))


def test_a_shard_larger_than_the_cache_is_one_line(shards, tmp_path):
    with (
        serving(shards) as store,
        caching(options(tmp_path, 5000)),
        pytest.raises(UsageError, match="the largest shard has"),
    ):
        open_dataset(f"{store.url}/train.json")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with caching(options(tmp_path)) as cache, pytest.raises(UsageError, match="--cache-dir"):
        cache.path.exists()
