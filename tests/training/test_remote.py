"""A run from a store equals the run from local files, bit for bit."""

import json
import os
import threading
import time

import pytest
from conftest import TINY_RUN, command, on_ranks, run
from stores import FAULTS, serving, write_store
from test_resume import assert_same

from wds_convnext.check.index import index
from wds_convnext.storage.layout import occupied
from wds_convnext.training.checkpoint import load_checkpoint

# More shards than lanes, so that not all of them are needed at one time.
OPTIONS = TINY_RUN | {
    "--epochs": "2",
    "--max-steps": "50",
    "--shuffle-buffer": "1",
    "--remote-timeout": "20",
}


def weights(folder):
    content = load_checkpoint(folder / "last.pt")
    del content["facts"], content["epoch_seconds"]
    return content


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("remote"), train=320, validation=12)


@pytest.fixture(scope="module")
def local(shards, tmp_path_factory):
    """What the untouched run on local files ends with."""
    out = tmp_path_factory.mktemp("local") / "run"
    run(command("train", "--shards", shards / "train.json", "--out", out, **OPTIONS))
    return weights(out)


class Watch(threading.Thread):
    """Looks at what a folder occupies, again and again."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.most, self.is_over = folder, 0, False
        self.start()

    def run(self):
        while not self.is_over:
            sizes = []
            for parent, _, names in os.walk(self.folder):
                for path in [parent, *(os.path.join(parent, name) for name in names)]:
                    sizes.append(occupied(path))
            self.most = max(self.most, sum(sizes))
            time.sleep(0.005)

    def stop(self):
        self.is_over = True
        self.join()
        return self.most


def test_a_hostile_store_changes_nothing(shards, local, tmp_path):
    """3 of 10 GETs fail in seven ways: the same weights, no wrong byte, never over the size."""
    size = 1_700_000
    assert sum(occupied(path) for path in map(str, shards.glob("*.tar"))) > size
    watch = Watch(tmp_path / "cache")
    with serving(shards, failing=0.3, stall_s=2) as store:
        arguments = ["--cache-dir", tmp_path / "cache", "--cache-size", size]
        options = OPTIONS | {"--workers": "2", "--out": tmp_path / "run"}

        done = run(command("train", "--shards", f"{store.url}/train.json", *arguments, **options))

    assert "Final Model Accuracy" in done.stdout
    assert_same(weights(tmp_path / "run"), local)
    assert 0 < watch.stop() <= size
    assert store.failed.keys() == set(FAULTS)
    assert store.num_ranges > 8  # samples of the first batches
    assert not list((tmp_path / "cache").glob("*/first"))
    fetched = [name for name in store.asked if name.endswith(".tar")]
    assert len(fetched) >= 160 and max(store.asked[name] for name in fetched) > 1
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    last = [entry for entry in logged if "remote/hits" in entry][-1]
    assert 0 < last["remote/hits"] < 1 and last["remote/fetched_gb"] > 0
    assert last["remote/waits"] > 0 and last["remote/wait_s"] > 0
    config = (tmp_path / "run/config.toml").read_text()
    assert f'shards = "{store.url}/train.json"' in config


def test_two_ranks_share_one_cache(shards, tmp_path):
    """Each shard is fetched once for both ranks; the weights are those of local shards.

    The store has no ranges, so the first batches wait for whole shards.
    """
    options = OPTIONS | {"--batch-size": "4", "--max-steps": "12", "--workers": "1"}

    def train(spec, name, *more):
        place = ["--shards", spec, "--out", tmp_path / name, *more]
        on_ranks(*[command("train", *place, **options)] * 2)
        return weights(tmp_path / name)

    with serving(shards, ranged=False) as store:
        indexed = {"out": str(tmp_path / "index"), "cache_dir": str(tmp_path / "other")}
        spec = f"{store.url}/train-<000..159>.tar,{store.url}/validation-<000..005>.tar"
        index(spec, jobs=1, quiet=True, **indexed)
        store.asked_whole.clear()
        found = train(tmp_path / "index", "remote", "--cache-dir", tmp_path / "cache")

    assert {*store.asked_whole} <= {shard.name for shard in shards.glob("*.tar")}
    assert len(store.asked_whole) > 40 and {*store.asked_whole.values()} == {1}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache-0"]
    assert_same(found, train(shards / "train.json", "local"))
