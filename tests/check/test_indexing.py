"""Shards that others made become shards that training opens at once, or are refused by name."""

import io
import json
import shutil
from pathlib import Path

import pytest
import webdataset
from conftest import command, encode_image, run, sample_members, write_shards, write_tar

from wds_convnext.check.index import index_shards, read_class_names
from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, ShardError, UsageError
from wds_convnext.shards.dataset import open_dataset, read_manifest
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.stream import ShardStream


def index(spec, **options):
    return index_shards(str(spec), quiet=True, **options)


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
    assert verify(str(tmp_path / "theirs"), deep=True, quiet=True).problems == ()
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
    assert verify(str(tmp_path), quiet=True).problems == ()


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
    index(tmp_path, class_names=read_class_names(str(names)))

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


@pytest.mark.parametrize(
    ("content", "said"),
    [("ant\nbee\n", "2 names, but labels up to 3"), ("ant\n\nbee\n", "line 2 is empty")],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path, content, said):
    """Too few, or a gap in the list."""
    write_shards(tmp_path, [4]).unlink()
    (tmp_path / "names.txt").write_text(content)

    with pytest.raises(UsageError, match=said):
        index(tmp_path, class_names=read_class_names(str(tmp_path / "names.txt")))


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
    assert about == {"num_samples": 9, "num_shards": 3, "num_classes": 3}
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels[4:7].tolist() == [1, 2, 0]
    assert dataset.index.has_checksums
    assert dataset.class_names == ("ant", "bee", "cat")
