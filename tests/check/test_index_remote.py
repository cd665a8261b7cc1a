"""`wds-convnext index` of shards at URLs: a local manifest and index that name them."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from stores import serving, write_store

from wds_convnext.check.index import index
from wds_convnext.check.verify import verify
from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import ShardError, UsageError, WdsConvnextError
from wds_convnext.shards.expand import reads_remote, split_specs
from wds_convnext.shards.opening import open_dataset, open_splits
from wds_convnext.storage.cache import caching


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Eight shards and a validation split, with manifests."""
    return write_store(tmp_path_factory.mktemp("described"), train=16, validation=4)


@pytest.fixture(scope="module")
def bare(described, tmp_path_factory):
    """The same shards, of which nothing is known."""
    folder = tmp_path_factory.mktemp("bare")
    for shard in described.glob("*.tar"):
        shutil.copy(shard, folder)
    return folder


def test_shards_of_others_are_indexed_where_they_are(described, bare, tmp_path):
    """Of a store whose GETs fail: the samples of the local shards, and nothing is fetched again."""
    local = open_dataset(str(described / "train.json"))
    out, options = tmp_path / "out", {"cache_dir": str(tmp_path / "cache"), "jobs": 1}
    faults = ["503", "cut", "flip", "length"]
    with serving(bare, failing=0.3, faults=faults, seed=2) as store:
        spec = f"{store.url}/train-<000..007>.tar,{store.url}/validation-{{000,001}}.tar"
        report = index(spec, out=str(out), quiet=True, **options)
        num_asked = store.asked.total()
        with caching(RemoteConfig(cache_dir=str(tmp_path / "cache"))):
            train_data, val_data, _ = open_splits(str(out), None, jobs=1, quiet=True)
            found = [train_data[number] for number in range(16)]

    assert found == [local[number] for number in range(16)] and len(val_data) == 4
    assert train_data.digest == local.digest and train_data.index.has_checksums
    assert train_data.shards[7].where == f"{store.url}/train-007.tar"
    assert store.asked.total() == num_asked and sum(store.failed.values()) > 5
    assert sorted(path.name for path in out.iterdir()) == [
        *("train.index", "train.json", "validation.index", "validation.json")
    ]
    assert list(map(str, report.manifests)) == [
        str(out / "train.json"),
        str(out / "validation.json"),
    ]
    with ThreadPoolExecutor(1) as executor, pytest.raises(UsageError, match="no cache of remote"):
        verify(str(out), executor=executor, quiet=True)
    assert reads_remote(str(out)) and reads_remote(str(out / "train.json"))
    assert not reads_remote(str(described)) and not reads_remote(str(described / "train.json"))
    for name in ("train.json", "train.index", "train-000.tar"):  # next to the remote validation
        shutil.copy(described / name, out / name)
    for train_spec in ("train.json", "train-<000..000>.tar"):
        specs = split_specs(str(out / train_spec), None)
        assert [reads_remote(spec) for spec in specs] == [False, True]
    assert len(split_specs(str(described / "none.json"), None)) == 1


def test_a_shard_that_changes_after_it_was_indexed_is_named(bare, tmp_path):
    store_folder = shutil.copytree(bare, tmp_path / "store")
    options = {"cache_dir": str(tmp_path / "cache"), "jobs": 1, "quiet": True}
    with serving(store_folder) as store:
        index(f"{store.url}/train-<000..002>.tar", out=str(tmp_path / "out"), **options)
        shutil.rmtree(tmp_path / "cache")
        shutil.copy(store_folder / "train-000.tar", store_folder / "train-001.tar")

        with pytest.raises(ShardError, match=f"{store.url}/train-001.tar: .*another than"):
            verify(str(tmp_path / "out/train.json"), **options)


@pytest.mark.parametrize(
    "spec, out, reason",
    [
        ("{url}/train-<000..003>.tar", None, "nothing is written to a store. Say where: --out"),
        ("{url}", "out", "no listings. Name the shards"),
        ("{url}/train-<000..009>.tar", "out", "train-008.tar: the store has no such object"),
        ("{url}/train-000.tar,{local}", "out", "not shards at a URL, or a folder"),
        ("{url}/broken-0.tar", "out", "^{url}/broken-0.tar: .*tar"),
        ("{local}", "out", "its index is written next to it"),
        ("{url}/train-000.tar", "taken", "train.json: is there already"),
    ],
)
def test_what_cannot_be_indexed_is_one_line(bare, tmp_path, spec, out, reason):
    """And nothing is left in the folder for the index."""
    (bare / "broken-0.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/train.json").write_text("{}")
    options = {"cache_dir": str(tmp_path / "cache"), "jobs": 1, "quiet": True}
    with serving(bare) as store, pytest.raises(WdsConvnextError) as refused:
        known = {"url": store.url, "local": bare}
        index(spec.format(**known), out=out and str(tmp_path / out), **options)

    assert refused.match(reason.format(**known))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "names, reason",
    [
        (
            "train-*.tar,{url}/validation-009.tar",
            "validation-009.tar: the store has no such object",
        ),
        ("train-*.tar,{url}/x-*.tar", "no shards named x-"),
        ("part-*.tar", "part-00000-of-00002.tar of the same series"),
    ],
)
def test_each_name_of_a_store_with_listings_has_to_be_there(bare, tmp_path, names, reason):
    """A glob next to a name does not hide that it is missing, nor a series that it has gaps."""
    folder = shutil.copytree(bare, tmp_path / "store")
    shutil.move(folder / "train-000.tar", folder / "part-00001-of-00002.tar")
    url = f"local://{folder}"

    with pytest.raises(ShardError, match=reason):
        index(f"{url}/{names.format(url=url)}", out=str(tmp_path / "out"), jobs=1, quiet=True)


def test_a_manifest_in_the_store_serves_after_the_local_one_is_gone(bare, tmp_path):
    """Uploaded, they are found by the shards' URL; the cache knew them by links to local files."""
    folder, out = shutil.copytree(bare, tmp_path / "store"), tmp_path / "out"
    options = {"cache_dir": str(tmp_path / "cache"), "jobs": 1, "quiet": True}
    with serving(folder) as store:
        index(f"{store.url}/train-<000..007>.tar", out=str(out), **options)
        for name in ("train.json", "train.index"):
            shutil.move(out / name, folder / name)
        report = verify(f"{store.url}/train.json", **options)

    assert not report.problems
