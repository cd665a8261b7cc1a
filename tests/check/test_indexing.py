"""Shards that others made become shards that training opens at once, or are refused by name."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset
from conftest import command, encode_image, run, sample_members, write_shards, write_tar

import wds_convnext.check.index
from wds_convnext.check.index import read_class_names
from wds_convnext.check.inspect import inspect
from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, ShardError, UsageError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.tar import walk_tar
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.stream import ShardStream


def index(spec, **options):
    return wds_convnext.check.index.index(str(spec), jobs=1, quiet=True, **options)


def write_json_shards(folder: Path, sizes: list[int], *, field: str) -> None:
    """As webdataset and img2dataset write them: numbers for names, labels in .json."""
    folder.mkdir(exist_ok=True)
    for i in range(len(sizes)):
        with webdataset.TarWriter(str(folder / f"{i:05d}.tar")) as writer:
            for number in range(sum(sizes[:i]), sum(sizes[: i + 1])):
                facts = {"caption": "a cat", "label": 77, field: number % 3, "width": 24}
                writer.write(
                    {"__key__": f"{number:09d}", "jpg": encode_image(number), "json": facts}
                )


def test_indexed_shards_read_the_same(tmp_path):
    """Manifest and sidecars are those that a conversion writes; verify agrees."""
    write_shards(tmp_path / "ours", [3, 2])
    (tmp_path / "theirs").mkdir()
    for shard in (tmp_path / "ours").glob("*.tar"):
        shutil.copy(shard, tmp_path / "theirs")

    report = index(tmp_path / "theirs")

    ours = read_manifest(tmp_path / "ours" / "train.json").shards
    theirs = read_manifest(tmp_path / "theirs" / "train.json").shards
    assert [(s.name, s.num_samples, s.num_bytes) for s in theirs] == [
        (s.name, s.num_samples, s.num_bytes) for s in ours
    ]
    for name in ("train-000.idx", "train-001.idx"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert verify(str(tmp_path / "theirs"), deep=True, jobs=1, quiet=True).problems == ()
    assert str(report).splitlines()[0] == (
        f"{tmp_path}/theirs/train.json: 5 samples, 4 classes, 2 shards, 0.0 MB"
    )


def test_labels_in_a_json_field_are_read_without_an_option_from_then_on(tmp_path):
    """The manifest remembers the field: for reading, for training's stream, for verify."""
    write_json_shards(tmp_path, [4, 3], field="class")

    index(tmp_path, label_field="class")

    dataset = open_dataset(str(tmp_path))
    assert (dataset.label_field, dataset.num_classes) == ("class", 3)
    stream = ShardStream(dataset, EvalOrder(dataset.sizes), batch_size=7, transform=_black_square)
    (batch,) = stream
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert verify(str(tmp_path), jobs=1, quiet=True).problems == ()


def _black_square(data, draws):
    import torch

    return torch.zeros((3, 8, 8), dtype=torch.uint8)


_black_square.image_size, _black_square.NUM_DRAWS = 8, 0


def test_class_names_are_given_or_numbers(tmp_path):
    """Over all splits of a folder, so that training and validation agree."""
    write_shards(tmp_path, [4], split="train").unlink()
    write_shards(tmp_path, [2], split="val").unlink()
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\nemu\n")

    index(tmp_path)
    numbered = [read_manifest(tmp_path / name).class_names for name in ("train.json", "val.json")]
    for name in ("train.json", "val.json"):
        (tmp_path / name).unlink()
    index(tmp_path, class_names=names)

    assert numbered == [("0", "1", "2", "3")] * 2
    assert read_manifest(tmp_path / "val.json").class_names == ("ant", "bee", "cat", "dog", "emu")


def repeat_a_key(folder):
    write_tar(folder / "train-001.tar", sample_members(2, start=1))


def lose_a_label(folder):
    write_tar(folder / "train-001.tar", sample_members(2, start=9)[:-1])


def dot_in_the_key(folder):
    image = encode_image(0)
    write_tar(folder / "train-001.tar", [("img.001.jpg", image), ("img.001.cls", b"0")])


def label_with_a_word(folder):
    write_tar(folder / "train-001.tar", [("9.jpg", encode_image(0)), ("9.cls", b"dog")])


def label_below_zero(folder):
    write_tar(folder / "train-001.tar", [("9.jpg", encode_image(0)), ("9.cls", b"-1")])


def identifier_for_a_label(folder):
    write_tar(folder / "train-001.tar", [("9.jpg", encode_image(0)), ("9.cls", b"20000000000")])


def cut(folder):
    shard = write_tar(folder / "train-001.tar", sample_members(2, start=9))
    Path(shard).write_bytes(Path(shard).read_bytes()[:1536])


def stale_sidecar(folder):
    write_tar(folder / "train-001.tar", sample_members(2, start=9))
    (folder / "train-001.idx").write_text("v1.2 0\n")


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (repeat_a_key, ShardError, "train-001.tar: the key 0001 is also in {}/train-000.tar"),
        (lose_a_label, ShardError, "train-001.tar, key 0010: no .cls or .json label"),
        (dot_in_the_key, ShardError, "train-001.tar, key img: no image (found .001.jpg"),
        (label_with_a_word, DataError, "train-001.tar, key 9: the label b'dog' is not an integer"),
        (label_below_zero, DataError, "train-001.tar, key 9: label -1 is outside"),
        (identifier_for_a_label, DataError, "key 9: label 20000000000 is outside"),
        (cut, ShardError, "train-001.tar: cut short"),
        (stale_sidecar, ShardError, "train-001.idx: says otherwise than a walk of the tar"),
    ],
)
def test_shards_that_training_would_trip_over_are_refused_by_name(tmp_path, fault, error, said):
    """And no manifest is written, so nothing reads as complete."""
    write_shards(tmp_path, [3]).unlink()
    fault(tmp_path)

    with pytest.raises(error) as caught:
        index(tmp_path)

    assert said.format(tmp_path) in str(caught.value)
    assert not (tmp_path / "train.json").exists()


def test_a_manifest_that_is_there_stays_and_its_shards_get_an_index(tmp_path):
    """So that old folders get checksums, too."""
    manifest = write_shards(tmp_path, [3, 2])
    before = manifest.read_bytes()

    index(tmp_path)

    assert manifest.read_bytes() == before
    assert open_dataset(str(manifest)).index.has_checksums


def test_shards_that_are_not_those_of_their_manifest_are_refused(tmp_path):
    """A manifest that lists more than is named, and one with another size."""
    manifest = write_shards(tmp_path, [3, 2])

    with pytest.raises((UsageError, ShardError), match="train-001.tar|lists other shards"):
        index(tmp_path / "train-000.tar")
    with open(tmp_path / "train-000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match="train-000.tar: num_bytes is"):
        index(tmp_path)
    assert not manifest.with_suffix(".index").exists()


def test_gaps_are_not_made_to_look_complete(tmp_path):
    """A range with a missing shard."""
    write_shards(tmp_path, [3, 2, 2]).unlink()
    (tmp_path / "train-001.tar").unlink()

    with pytest.raises(ShardError, match="train-001.tar: missing"):
        index(tmp_path / "train-<000..002>.tar")


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


@pytest.mark.parametrize("fault", [cut, label_with_a_word, repeat_a_key])
def test_a_failure_leaves_nothing_behind(tmp_path, fault):
    """No sidecar of another shard or split; what was there before stays."""
    write_shards(tmp_path, [3]).unlink()
    write_shards(tmp_path, [2], split="val").unlink()
    for path in tmp_path.glob("*-000.idx"):
        path.unlink()
    fault(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}

    with pytest.raises((ShardError, DataError)):
        index(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == before


def test_sidecars_of_dalis_own_are_accepted(tmp_path):
    """wds2idx keeps the case of extensions and of names."""
    members = [(name.replace("jpg", "JPEG"), data) for name, data in sample_members(2)]
    shard = write_tar(tmp_path / "train-000.tar", members)
    lines = ["v1.2 2"]
    for image, label in walk_tar(shard):
        line = f"JPEG {image.offset} {image.num_bytes} {image.name}"
        lines.append(f"{line} cls {label.offset} {label.num_bytes} {label.name}")
    (tmp_path / "train-000.idx").write_text("\n".join(lines) + "\n")

    index(tmp_path)

    assert len(open_dataset(str(tmp_path))) == 2
    assert verify(str(tmp_path), jobs=1, quiet=True).problems == ()


@pytest.mark.parametrize(
    "content",
    [
        {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": []},
        {"info": {}, "images": [], "annotations": []},
        ["ant", "bee"],
    ],
)
def test_json_of_others_is_no_manifest_and_is_not_replaced(tmp_path, content):
    """Next to shards it says nothing; in the manifest's place it is to be moved away."""
    write_shards(tmp_path, [3]).unlink()
    (tmp_path / "wids-meta.json").write_text(json.dumps(content))
    (tmp_path / "._train-000.tar").write_bytes(b"AppleDouble")

    index(tmp_path)

    assert verify(str(tmp_path), jobs=1, quiet=True).problems == ()
    assert [s.dataset.split for s in inspect(str(tmp_path), jobs=1, quiet=True)] == ["train"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert len(open_dataset(str(tmp_path))) == 3
    with pytest.raises(UsageError, match="train.json: not written by this tool"):
        index(tmp_path)
    assert json.loads((tmp_path / "train.json").read_text()) == content


def test_advice_names_no_test_split(tmp_path):
    """Whatever comes first by name."""
    write_shards(tmp_path, [2], split="a_test").unlink()
    alone = index(tmp_path)
    write_shards(tmp_path, [2], split="train").unlink()

    both = index(tmp_path)

    assert "next:" not in str(alone)
    assert str(both).endswith(f"next: wds-convnext train --shards {tmp_path}/train.json")


@pytest.mark.parametrize(
    "content",
    [
        "ant\nbee\ncat\ndog\n",
        "\ufeffant\r\nbee\r\ncat\r\ndog",
        '\ufeff[\n"ant", "bee","cat", "dog"]',
    ],
)
def test_class_names_are_lines_or_a_json_list(tmp_path, content):
    """As Windows writes them, too: with a byte order mark."""
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")

    assert read_class_names(str(tmp_path / "names.txt")) == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("content", ['{"ant": 0}', "[1, 2]", "[[]]", '["ant"'])
def test_json_that_is_no_list_of_names_is_refused(tmp_path, content):
    """In one line."""
    (tmp_path / "names.txt").write_text(content)

    with pytest.raises(UsageError, match="names.txt: (JSON, but not a list|not a readable)"):
        read_class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [("ant\nbee\n", "2 names, but labels up to 3"), ("ant\n\nbee\n", "line 2 is empty")],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path, content, said):
    """Too few, or a gap in the list."""
    write_shards(tmp_path, [4]).unlink()
    (tmp_path / "names.txt").write_text(content)

    with pytest.raises(UsageError, match=said):
        index(tmp_path, class_names=tmp_path / "names.txt")


def test_splits_with_labels_in_different_fields_are_not_mixed(tmp_path):
    """One reader reads one field."""
    write_json_shards(tmp_path / "a", [3], field="class")
    write_json_shards(tmp_path / "b", [3], field="kind")
    index(tmp_path / "a", label_field="class")
    index(tmp_path / "b", label_field="kind")

    with pytest.raises(ShardError, match="different .json fields"):
        open_dataset(f"{tmp_path}/a/00000.tar,{tmp_path}/b/00000.tar")


@pytest.mark.slow
def test_the_command_line_indexes_with_several_processes(tmp_path):
    """Names from a file, a field by option, JSON out; then verify and read."""
    write_json_shards(tmp_path, [4, 3, 2], field="class")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    options = {"--label-field": "class", "--class-names": tmp_path / "names.txt", "--jobs": 2}

    result = run(command("index", tmp_path, "--json", **options))

    (about,) = json.load(io.StringIO(result.stdout)).values()
    assert about == {"num_samples": 9, "num_shards": 3, "num_classes": 3, "unused": {}}
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels[4:7].tolist() == [1, 2, 0]
    assert dataset.index.has_checksums
    assert dataset.class_names == ("ant", "bee", "cat")
