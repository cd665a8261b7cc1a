"""Shards that others made become shards that training opens at once."""

import io
import json
import shutil
from pathlib import Path

import pytest
import webdataset
from conftest import command, encode_image, run, sample_members, write_shards, write_tar

import wds_convnext.check.index
from wds_convnext.check.inspect import inspect
from wds_convnext.check.verify import verify
from wds_convnext.errors import ShardError, UsageError
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


def test_a_manifest_that_is_there_stays_and_its_shards_get_an_index(tmp_path):
    """So that old folders get checksums, too."""
    manifest = write_shards(tmp_path, [3, 2])
    before = manifest.read_bytes()

    index(tmp_path)

    assert manifest.read_bytes() == before
    assert open_dataset(str(manifest)).index.has_checksums


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
