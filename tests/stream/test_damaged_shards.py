"""Samples that do not decode are replaced or left out and listed; other damage ends the stream."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from streams import (
    SIZES,
    concatenated,
    damage_images,
    eval_stream,
    take,
    train_order,
    train_stream,
    write_damaged,
)

from wds_convnext.errors import ShardError, TrainingError
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import make_loader

pytestmark = pytest.mark.usefixtures("no_workers_left")


@pytest.fixture
def damaged_set(tmp_path) -> Dataset:
    return write_damaged(tmp_path)


def test_a_bad_sample_is_replaced_and_listed(damaged_set):
    """By the next of its shard that decodes; with shard, key, offset, epoch and reason."""
    order = train_order(damaged_set, global_batch=23, buffer=23)
    reader = SampleReader(damaged_set)
    replacement = {2: 4, 3: 4, 20: 21}

    batch = take(train_stream(damaged_set, batch_size=23, global_batch=23, buffer=23), 1)[0]

    numbers = order.global_batch(0).number.tolist()
    assert batch.labels.tolist() == [replacement.get(n, n) % 4 for n in numbers]
    assert batch.is_real.all()
    # Sample 2 is replaced by 4 because 3 does not decode either, so 3 is listed twice.
    listed = [(Path(bad["shard"]).name, bad["key"]) for bad in batch.bad_samples]
    assert sorted(listed) == [
        ("train-000.tar", "0002"),
        ("train-000.tar", "0003"),
        ("train-000.tar", "0003"),
        ("train-003.tar", "0020"),
    ]
    for bad in batch.bad_samples:
        assert bad.keys() == {"shard", "key", "offset", "epoch", "reason"}
        assert bad["epoch"] == 0
        assert bad["reason"]
        assert Path(bad["shard"]).read_bytes()[bad["offset"] :].startswith(b"no jpeg!")
    assert reader.describe(2)["key"] == "0002"


def test_a_replacement_moves_no_other_sample(damaged_set, tmp_path):
    """All other pixels and labels are those of the whole shards."""
    dataset = open_dataset(str(write_shards(tmp_path / "whole", SIZES)))
    whole = concatenated(take(train_stream(dataset), 6))

    damaged = concatenated(take(train_stream(damaged_set), 6))

    numbers = np.concatenate([train_order(dataset).global_batch(step).number for step in range(6)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(whole.images, damaged.images)])
    assert same.tolist() == [number not in (2, 3, 20) for number in numbers]


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_a_bad_sample_out(damaged_set, workers):
    """Nothing takes its place, nor what its memory held: the result is over those that decode."""
    batches = list(make_loader(eval_stream(damaged_set), workers=workers))

    seen = concatenated(batches)
    assert not seen.images[~seen.is_real].any()
    assert seen.labels[seen.is_real].tolist() == [i % 4 for i in range(23) if i not in (2, 3, 20)]
    assert [bad["key"] for bad in seen.bad_samples] == ["0002", "0003", "0020"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_in_which_nothing_decodes_stops_the_run(tmp_path, workers):
    """There is no sample of it to take the place of another."""
    dataset = open_dataset(str(write_shards(tmp_path, [3])))
    damage_images(dataset, [(0, 0), (0, 1), (0, 2)])

    with pytest.raises(TrainingError) as error:
        take(train_stream(dataset), 1, workers=workers)

    assert f"{dataset.shards[0].path}: no sample that decodes from " in str(error.value)
    assert "\n" not in str(error.value)


def relabel(dataset: Dataset, label: bytes) -> None:
    """Give the first sample another label, of one byte."""
    reader = SampleReader(dataset)
    whole = Path(dataset.shards[0].path).read_bytes()
    at = reader.dataset.index.record(0, 0).places[1][0]
    Path(dataset.shards[0].path).write_bytes(whole[:at] + label + whole[at + 1 :])


def cut(dataset: Dataset) -> None:
    os.truncate(dataset.shards[0].path, 1000)


def remove(dataset: Dataset) -> None:
    os.unlink(dataset.shards[0].path)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stream", [train_stream, eval_stream])
@pytest.mark.parametrize(
    ("damage", "error_class", "message"),
    [
        (
            cut,
            ShardError,
            "{}: 1,000 bytes, but its manifest says 10,240. The shard is cut short or another "
            "file: copy it again, or write it again.",
        ),
        (remove, ShardError, "{}: No such file or directory. Copy it again."),
    ],
)
def test_an_error_of_a_worker_arrives_as_itself(
    tmp_path, workers, stream, damage, error_class, message
):
    """The exception with its one line, not a worker's traceback in a RuntimeError."""
    dataset = open_dataset(str(write_shards(tmp_path, [3])))
    damage(dataset)

    with pytest.raises(error_class) as error:
        take(stream(dataset), 1, workers=workers)

    assert type(error.value) is error_class
    assert str(error.value) == message.format(dataset.shards[0].path)


def test_a_label_that_is_no_class_stops_the_run(tmp_path):
    """It was so when the shards were indexed, so other samples may be labeled as wrongly."""
    manifest = write_shards(tmp_path, [3])
    relabel(open_dataset(str(manifest)), b"9")

    with pytest.raises(ShardError, match="key 0000: label 9 is outside the 4 classes"):
        take(train_stream(open_dataset(str(manifest))), 1)


@pytest.mark.parametrize("label", [b"1", b"9", b"x"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_that_is_not_the_indexed_one_is_a_bad_sample(tmp_path, label, workers):
    """Another class, no class, no number: replaced in training, left out in evaluation."""
    dataset = open_dataset(str(write_shards(tmp_path, [3])))
    relabel(dataset, label)

    trained = take(train_stream(dataset), 3, workers=workers)
    (evaluated,) = take(eval_stream(dataset, batch_size=4), 1, workers=workers)

    bad = [sample for batch in trained for sample in batch.bad_samples]
    assert {sample["key"] for sample in bad} == {"0000"}
    assert all(batch.is_real.all() for batch in trained)
    assert evaluated.is_real.tolist() == [False, True, True, False]
    assert [sample["key"] for sample in evaluated.bad_samples] == ["0000"]


def test_batches_before_an_error_are_handed_over(tmp_path):
    """With several workers too, the error comes in its batch's turn."""
    dataset = open_dataset(str(write_shards(tmp_path, [8])))
    where = SampleReader(dataset).describe(6)
    with open(where["shard"], "r+b") as file:
        file.seek(where["offset"] - 512)
        file.write(bytes(512))
    batches = make_loader(eval_stream(dataset, batch_size=2), workers=3)

    labels = [next(batches).labels.tolist() for _ in range(3)]

    assert labels == [[0, 1], [2, 3], [0, 1]]
    with pytest.raises(ShardError, match="no member of"):
        next(batches)
