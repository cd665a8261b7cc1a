"""A run from a store equals the run from local files, bit for bit."""

import os
import threading
import time

import pytest
from conftest import TINY_RUN, command, run
from stores import FAULTS, serving, write_store
from test_resume import assert_same

from wds_convnext.storage.layout import occupied
from wds_convnext.training.checkpoint import load_checkpoint

# More shards than lanes, so that not all of them are needed at one time.
OPTIONS = TINY_RUN | {
    "--epochs": "2",
    "--max-steps": "50",
    "--shuffle-buffer": "1",
    "--remote-timeout": "6",
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
    config = (tmp_path / "run/config.toml").read_text()
    assert f'shards = "{store.url}/train.json"' in config


def test_a_store_without_ranges_is_waited_for(shards, local, tmp_path):
    """The first batches wait for whole shards; the weights are the same."""
    with serving(shards, ranged=False) as store:
        arguments = ["--cache-dir", tmp_path / "cache"]
        options = OPTIONS | {"--workers": "1", "--out": tmp_path / "run"}
        run(command("train", "--shards", f"{store.url}/train.json", *arguments, **options))

    assert_same(weights(tmp_path / "run"), local)
    assert store.num_ranges == 0
