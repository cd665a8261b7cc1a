"""Specs: what a name on the command line means, or one line why not.

Names are all that counts here, so most files are empty.
"""

import re
from pathlib import Path

import pytest
from conftest import write_shards
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.errors import ShardError
from wds_convnext.shards.expand import expand_spec, find_counterpart
from wds_convnext.shards.naming import is_held_out, purpose, split_of
from wds_convnext.shards.spec import (
    manifest_path,
    staging_path,
)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with 13 training and 2 validation shards under data/."""
    (tmp_path / "data").mkdir()
    for i in range(13):
        (tmp_path / f"data/train-{i:03d}.tar").touch()
        (tmp_path / f"data/train-{i:03d}.idx").touch()
    for i in range(2):
        (tmp_path / f"data/val-{i:03d}.tar").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*numbers: int) -> list[str]:
    return [f"data/train-{i:03d}.tar" for i in numbers]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("data/train-<000..012>.tar", train(*range(13))),
        ("data/train-{000..012}.tar", train(*range(13))),
        ("data/train-<010..012>.tar", train(10, 11, 12)),
        ("data/train-{000,007}.tar", train(0, 7)),
        ("data/train-{000..006..3}.tar", train(0, 3, 6)),
        ("data/train-{002..000}.tar", train(2, 1, 0)),
        ("data/train-00[0-2].tar", train(0, 1, 2)),
        ("data/train-01?.tar", train(10, 11, 12)),
        ("data/train-01*", train(10, 11, 12)),
        ("data/**/train-012.tar", train(12)),
        ("data/train-005.tar", train(5)),
        ("file://data/train-005.tar", train(5)),
        ("data/train-005.tar,data/train-001.tar", train(5, 1)),
        (" data/train-005.tar , data/train-001.tar, ", train(5, 1)),
        ("data/train-<000..001>.tar,data/train-01[12].tar", train(0, 1, 11, 12)),
        ("data/{train-012,train-{000..001}}.tar", train(12, 0, 1)),
        ("data/train-{000,001}.tar,data/train-{003,004}.tar", train(0, 1, 3, 4)),
    ],
)
def test_a_spec_names_shards_in_order(here, spec, expected):
    """Ranges as the article writes them, braces as webdataset's, globs, files, comma lists."""
    assert expand_spec(spec) == expected


@given(first=st.integers(0, 12), last=st.integers(0, 12))
def test_angle_brackets_mean_braces(tmp_path_factory, first, last):
    """`<000..012>` names the files that `{000..012}` names, upwards and downwards."""
    folder = tmp_path_factory.getbasetemp() / "angles"
    folder.mkdir(exist_ok=True)
    for i in range(13):
        (folder / f"train-{i:03d}.tar").touch()

    angles = expand_spec(f"{folder}/train-<{first:03d}..{last:03d}>.tar")

    assert angles == expand_spec(f"{folder}/train-{{{first:03d}..{last:03d}}}.tar")
    assert len(angles) == abs(last - first) + 1


def test_an_absolute_glob_matches(here):
    """A glob may begin at the root."""
    assert expand_spec(f"{here}/data/train-01*.tar") == [
        f"{here}/{name}" for name in train(10, 11, 12)
    ]


def test_a_folder_of_one_split_is_all_its_shards(here):
    """Sidecars and other files in it are passed over."""
    for path in (here / "data").glob("val-*"):
        path.unlink()

    assert expand_spec("data") == train(*range(13))


@pytest.mark.parametrize("use", ["train", "validation"])
def test_a_folder_is_its_split_for_the_use(here, use):
    """Training takes its training split, evaluation its validation split; never the test split."""
    for name in ("test-000.tar", "._train-000.tar", "._val-000.tar"):
        (here / "data" / name).touch()

    expected = train(*range(13)) if use == "train" else [f"data/val-00{i}.tar" for i in range(2)]
    assert expand_spec("data", use=use) == expected


@pytest.mark.parametrize(
    ("splits", "use", "expected"),
    [
        (["pictures", "pictures_test"], "train", "pictures"),
        (["a_train", "mydata", "mydata-val"], "train", "a_train"),
        (["a-train", "b-train"], "train", "several train splits, a-train, b-train"),
        (["one", "two"], "train", "several train splits, one, two"),
        (["test"], "train", "no train split, but test"),
        (["val2017", "test2017"], "train", "no train split, but test2017, val2017"),
        (["train", "valid"], "validation", "valid"),
        (["train", "test"], "validation", "no validation split, but test, train"),
    ],
)
def test_a_folder_that_leaves_a_choice_lists_its_splits(tmp_path, splits, use, expected):
    """No advice names a test split."""
    for split in splits:
        (tmp_path / f"{split}-000.tar").touch()

    if expected in splits:
        assert expand_spec(str(tmp_path), use=use) == [f"{tmp_path}/{expected}-000.tar"]
    else:
        with pytest.raises(ShardError, match=expected) as error:
            expand_spec(str(tmp_path), use=use)
        assert not re.search("test[0-9]*[*]", str(error.value))


def test_a_folder_holds_what_its_manifest_lists(tmp_path):
    """Also where a shard is missing, so that opening it fails; other JSON says nothing."""
    write_shards(tmp_path, [2, 1])
    (tmp_path / "train-001.tar").unlink()
    (tmp_path / "wids-meta.json").write_text('{"wids_version": 1, "shardlist": []}')
    (tmp_path / "val-000.tar").touch()
    (tmp_path / "val.json").write_text('{"images": [], "annotations": []}')

    assert expand_spec(str(tmp_path)) == [f"{tmp_path}/train-{i:03d}.tar" for i in range(2)]
    assert expand_spec(str(tmp_path), use="validation") == [f"{tmp_path}/val-000.tar"]
    with pytest.raises(ShardError, match="1 of 2 shards are missing: .*train-001.tar"):
        expand_spec(f"{tmp_path}/train-*.tar")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("spec", ["", "/*.tar", "/train-*-of-*"])
def test_a_numbered_series_lacks_no_shard(tmp_path, spec, first):
    """What the names say of their number is believed; one shard that is named is all there is."""
    folder = tmp_path / "data [v1]"
    folder.mkdir()
    for i in range(first, first + 3):
        (folder / f"train-{i:05d}-of-00003.tar").touch()

    whole = expand_spec(f"{folder}{spec}")
    Path(whole[1]).unlink()

    assert len(whole) == 3
    with pytest.raises(ShardError, match=f"1 of 3 shards are missing: {re.escape(whole[1])}"):
        expand_spec(f"{folder}{spec}")
    assert expand_spec(f"{folder}{spec}", allow_missing=True) == whole
    assert expand_spec(whole[0]) == [whole[0]]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "train"),
        ("trainval", "train"),
        ("imagenet_training", "train"),
        ("val", "validation"),
        ("mydata-valid", "validation"),
        ("VAL2017", "validation"),
        ("dev_clean", "validation"),
        ("mydata_test", "test"),
        ("testA", "test"),
        ("myTest", "test"),
        ("test_of_time_train", "train"),
        ("valley", None),
        ("contest", None),
        ("pictures", None),
    ],
)
def test_the_words_of_a_name_say_what_a_split_is_for(split, expected):
    """Whole words, in any case; `train` before others."""
    assert purpose(split) == expected
    assert is_held_out(split) == (expected in ("validation", "test"))


@pytest.mark.parametrize(
    ("there", "training", "expected"),
    [
        (["valid-000.tar"], "train-000.tar", "valid-*.tar"),
        (["dev_0.tar", "val_0.tar"], "train_0.tar", "val_*.tar"),
        (["a-val-0.tar", "b-val-0.tar"], "b-train-0.tar", "b-val-*.tar"),
        (["b-val-0.tar"], "a-train-0.tar", None),
        (["b-val-0.tar", "val.tar"], "a-train-0.tar", "val.tar"),
        (["val7.tar"], "train7.tar", "val[0-9]*.tar"),
        (["val-00000-of-00001.tar"], "shard-0.tar", "val-*.tar"),
        (["test-0.tar"], "train-0.tar", None),
    ],
)
def test_validation_shards_go_with_the_training_shards(tmp_path, there, training, expected):
    """Those of the same data set by name; the spec names them all, in any folder."""
    folder = tmp_path / "[x]"
    folder.mkdir()
    for name in (*there, training):
        (folder / name).touch()

    found = find_counterpart(f"{folder}/{training}", use="validation")

    assert found == (expected and f"{folder}/{expected}")
    assert found is None or len(expand_spec(found)) == 1


def test_a_folder_of_numbered_shards_is_one_split(tmp_path):
    """img2dataset names its shards 00000.tar, 00001.tar: these are no splits of one shard each."""
    for i in range(3):
        (tmp_path / f"{i:05d}.tar").touch()

    assert expand_spec(str(tmp_path)) == [f"{tmp_path}/{i:05d}.tar" for i in range(3)]


def test_a_manifest_is_its_shards(tmp_path):
    """In the order it lists them, joined to its folder."""
    manifest = write_shards(tmp_path / "data", [2, 1])

    assert expand_spec(str(manifest)) == [f"{tmp_path}/data/train-{i:03d}.tar" for i in range(2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "data/train-<000..014>.tar",
            "data/train-<000..014>.tar: 2 of 15 shards are missing: data/train-013.tar, "
            "data/train-014.tar. Copy or write them, or name only those that are there.",
        ),
        (
            "data/train-{000..040}.tar",
            "data/train-{000..040}.tar: 28 of 41 shards are missing: data/train-013.tar, "
            "data/train-014.tar, data/train-015.tar, data/train-016.tar, data/train-017.tar "
            "and 23 more. Copy or write them, or name only those that are there.",
        ),
        (
            "data/trian-000.tar",
            "data/trian-000.tar: no shard matches. Did you mean data/train-000.tar or "
            "data/train-010.tar or data/train-009.tar? Write shards with wds-convnext shards.",
        ),
        (
            "dat",
            "dat: no shard matches. There is data/train-000.tar. "
            "Write shards with wds-convnext shards.",
        ),
        (
            "nowhere/train-<000..012>.tar",
            "nowhere/train-<000..012>.tar: no shard matches: there is no folder nowhere. "
            "Write shards with wds-convnext shards.",
        ),
        (
            "nowhere/*.tar",
            "nowhere/*.tar: no shard matches: there is no folder nowhere. "
            "Write shards with wds-convnext shards.",
        ),
        (
            "data/train.json",
            "data/train.json: no such manifest. Write shards with wds-convnext shards.",
        ),
        (
            "data/train-{000..012.tar",
            "data/train-{000..012.tar: its braces do not pair. Write {000..012}.",
        ),
        (
            "data/train-<000..99999>-{0..99999}.tar",
            "data/train-{000..99999}-{0..99999}.tar: its ranges name 10,000,000,000 files, "
            "the limit is 1,000,000. Look at the numbers.",
        ),
        ("", "--shards '': names no shard. Give for example data/train.json."),
        (" , ", "--shards ' , ': names no shard. Give for example data/train.json."),
        (
            "data/train-000.tar,data/train-<000..002>.tar",
            "--shards 'data/train-000.tar,data/train-<000..002>.tar': names data/train-000.tar "
            "more than once. Name it once.",
        ),
        (
            "data/train-000.tar,./data/train-000.tar",
            "--shards 'data/train-000.tar,./data/train-000.tar': names data/train-000.tar more "
            "than once. Name it once.",
        ),
        (
            "pipe:cat data/train-000.tar",
            "pipe:cat data/train-000.tar: pipes run a shell, so they are not read. Name files.",
        ),
    ],
)
def test_a_spec_that_names_no_shards_ends_in_one_line(here, spec, message):
    """What was found, and what to do; a range says which files are missing."""
    with pytest.raises(ShardError) as error:
        expand_spec(spec)

    assert str(error.value) == message


def test_an_empty_folder_says_so(tmp_path):
    """A folder without shards is no shard set of length zero."""
    folder = tmp_path / "empty"
    folder.mkdir()

    with pytest.raises(ShardError, match=r"empty: no shard matches\. Write shards"):
        expand_spec(str(folder))


def test_a_wrong_name_is_answered_without_a_walk_of_everything(tmp_path):
    """Hints come from two levels below the folder that the spec begins with, not from all."""
    deep = tmp_path / "one/two/three"
    deep.mkdir(parents=True)
    (deep / "train-000.tar").touch()
    (tmp_path / "one/train-001.tar").touch()

    with pytest.raises(ShardError) as error:
        expand_spec(f"{tmp_path}/train-000.tar")

    assert "one/train-001.tar" in str(error.value)
    assert "three" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"),
        ("data/train-000123.tar", "train"),
        ("imagenet-train-000123.tar", "imagenet-train"),
        ("val_01.tar", "val"),
        ("shard7.tar", "shard"),
        ("train.tar", "train"),
        ("00000.tar", "all"),
        ("train-00000-of-00002.tar", "train"),
        ("imagenet1k_train.3-of-8.tar", "imagenet1k_train"),
        ("00000-of-00002.tar", "all"),
    ],
)
def test_the_split_is_the_name_without_its_number(name, split):
    """Also for names that others gave."""
    assert split_of(name) == split


def test_a_shards_manifest_and_staging_folder_stand_beside_it():
    """Both are found by name alone."""
    assert manifest_path("data/train-000.tar") == "data/train.json"
    assert manifest_path("train-000.tar") == "train.json"
    assert staging_path("data/train.json") == "data/train.partial"
