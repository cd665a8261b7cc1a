"""What shards hold beside samples, or in no sample, is counted and named, or refused."""

import tarfile

import pytest
from conftest import encode_image, sample_members, write_tar
from test_indexing import index

from wds_convnext.check.verify import verify
from wds_convnext.errors import ShardError
from wds_convnext.shards.opening import open_dataset


def link(name: str, kind: bytes, target: str = "0000.jpg") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def add(shard: str, *infos: tarfile.TarInfo) -> None:
    with tarfile.open(shard, "a") as tar:
        for info in infos:
            tar.addfile(info)


@pytest.mark.parametrize("name", ["LICENSE", ".DS_Store", "._0001.jpg", "folder", "__meta__"])
def test_what_follows_the_last_sample_is_no_damage(tmp_path, monkeypatch, name):
    """With and without a sidecar the samples are the same; what is not taken is named."""
    shard = write_tar(tmp_path / "train-000.tar", sample_members(3))
    add(shard, link(name, tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE))
    walked = open_dataset(shard)

    report = index(tmp_path)

    dataset = open_dataset(shard)
    assert (tmp_path / "train-000.idx").exists()
    assert [dataset[i] for i in range(3)] == [walked[i] for i in range(3)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "train.json").unlink()
    assert len(open_dataset(shard)) == 3  # from the sidecar, as of shards with no manifest
    index(tmp_path)
    assert verify(str(tmp_path), deep=True, jobs=1, quiet=True).problems == ()
    named = {"folder": [], "._0001.jpg": ["._* 1"]}.get(name, [f"{name} 1"])
    assert [f"not used: {n}" in str(report) for n in named] == [True] * len(named)


def test_members_that_are_not_taken_are_counted_by_extension(tmp_path):
    """Captions, masks: a second picture of a sample is named, too."""
    members = sample_members(2)
    members[1:1] = [("0000.seg.png", b"mask"), ("0000.txt", b"a cat")]
    write_tar(tmp_path / "train-000.tar", [*members, ("0001.txt", b"a dog")])

    report = index(tmp_path)

    assert "not used: .txt 2, .seg.png 1" in str(report)
    (about,) = report.to_json().values()
    assert about["unused"] == {".txt": 2, ".seg.png": 1}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("alone", [False, True])
def test_a_sample_of_links_does_not_vanish(tmp_path, kind, alone):
    """Index and training refuse the shard, verify finds it, by name."""
    shard = write_tar(tmp_path / "train-000.tar", [] if alone else sample_members(2))
    add(shard, link("0009.jpg", kind), link("0009.cls", kind))

    for look in (lambda: index(tmp_path), lambda: open_dataset(shard)):
        with pytest.raises(ShardError, match="0009.jpg is a link.*--hard-dereference"):
            look()
    (problem,) = verify(str(tmp_path), jobs=1, quiet=True).problems
    assert "0009.jpg is a link" in str(problem)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-000.tar"]


@pytest.mark.parametrize("members", [[], [("picture", b"1"), (".a.jpg", b"2")]])
def test_nothing_is_indexed_as_no_samples(tmp_path, members):
    """An empty split, or files that are no samples."""
    write_tar(tmp_path / "train-000.tar", members)

    with pytest.raises(ShardError, match="hold no samples|none of its 2 files .*picture"):
        index(tmp_path)
    assert not (tmp_path / "train.json").exists()


def test_pictures_with_numbers_after_a_dot_are_no_single_sample(tmp_path):
    """cat.jpg, cat.1.jpg, cat.2.jpg are three pictures, of which two would be dropped."""
    image = encode_image(0)
    members = [("cat.jpg", image), ("cat.1.jpg", image), ("cat.2.jpg", image), ("cat.cls", b"0")]
    write_tar(tmp_path / "train-000.tar", members)

    with pytest.raises(ShardError, match="cat.1.jpg and cat.jpg have one key"):
        index(tmp_path)
