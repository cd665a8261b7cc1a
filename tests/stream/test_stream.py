"""One stream of batches for any workers, ranks and starts; and what happens to bad samples."""

import multiprocessing
import os
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    SIZES,
    TRAIN,
    assert_same,
    damage_images,
    eval_stream,
    take,
    train_order,
    train_stream,
)

from wds_convnext.errors import ShardError, TrainingError, UsageError
from wds_convnext.rng import uniform
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.stream import Batch, ShardStream, ValidatedStream
from wds_convnext.stream.workers import Slots

pytestmark = pytest.mark.usefixtures("no_workers_left")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Uneven shards, all whole."""
    return open_dataset(str(write_shards(tmp_path_factory.mktemp("whole"), SIZES)))


@pytest.fixture
def damaged_set(tmp_path) -> Dataset:
    """The same shards, but samples 2, 3 and 20 do not decode."""
    return damage_images(open_dataset(str(write_shards(tmp_path, SIZES))), [(0, 2), (0, 3), (3, 0)])


def concatenated(batches: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat(tensors) for tensors in list(zip(*batches))[:3]),
        [bad for batch in batches for bad in batch.bad_samples],
    )


def test_a_batch_is_its_orders_samples_transformed(dataset):
    """uint8 pixels and labels of the samples that the order names, drawn for (epoch, sample)."""
    order = train_order(dataset)
    reader = SampleReader(dataset)

    batches = take(train_stream(dataset), 8)

    for step, batch in enumerate(batches):
        refs = order.micro_batch(step, batch_size=4, rank=0, world_size=1)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 3, 16, 16)
        draws = uniform(order.sample_keys(refs), TRAIN.NUM_DRAWS)
        for i in range(4):
            data, label = reader.read(int(refs.number[i]))
            assert torch.equal(batch.images[i], TRAIN(data, draws[i]))
            assert batch.labels[i] == label
        assert batch.is_real.all()
        assert batch.bad_samples == []


def test_augmentation_changes_with_the_epoch(dataset):
    """The same sample gets another crop in the next epoch, and the same one when asked again."""
    stream = train_stream(dataset, batch_size=23, global_batch=23, buffer=23)
    numbers = [stream.order.global_batch(step).number for step in range(2)]

    first, second = take(stream, 2)

    again = take(stream, 1)[0]
    of_first = first.images[np.argsort(numbers[0])]
    of_second = second.images[np.argsort(numbers[1])]
    assert torch.equal(again.images, first.images)
    assert all(not torch.equal(a, b) for a, b in zip(of_first, of_second))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_stream_is_the_same_for_any_number_of_workers(damaged_set, workers):
    """Down to the pixels, over two epochs, bad samples included; more workers than shards too."""
    straight = take(train_stream(damaged_set), 13)

    assert_same(take(train_stream(damaged_set), 13, workers=workers), straight)


def test_a_slow_trainer_sees_the_same_stream(dataset, monkeypatch):
    """No worker writes into a slot that has not been copied yet, however long that takes."""
    straight = take(train_stream(dataset), 8)
    images = Slots.images

    def slow_images(slots, worker, slot):
        if multiprocessing.parent_process() is None:
            time.sleep(0.1)
        return images(slots, worker, slot)

    monkeypatch.setattr(Slots, "images", slow_images)

    assert_same(take(train_stream(dataset), 8, workers=2), straight)


def test_the_stream_is_the_same_from_spawned_workers(dataset, monkeypatch):
    """As on systems without a safe fork."""
    monkeypatch.setattr("wds_convnext.stream.workers.START_METHOD", "spawn")

    spawned = take(train_stream(dataset), 7, workers=2)

    assert_same(spawned, take(train_stream(dataset), 7))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize(("start", "accumulate"), [(0, 1), (2, 1), (6, 2)])
def test_validation_comes_in_its_place_and_changes_nothing(dataset, workers, start, accumulate):
    """After each step that is due the whole split, then the training stream goes on."""
    train = train_stream(dataset, start=start)
    stream = ValidatedStream(
        train, eval_stream(dataset), accumulate=accumulate, is_due={2, 4}.__contains__
    )
    training = take(train, 10 - start)
    validation = list(make_loader(eval_stream(dataset), workers=0))
    expected = []
    for number, batch in enumerate(training, start + 1):
        expected += [batch, *(validation if number / accumulate in (2, 4) else [])]

    assert_same(take(stream, len(expected), workers=workers), expected)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 4, 5])
def test_a_stream_that_starts_later_is_the_tail(dataset, workers, start):
    """Resumed at any batch, with any number of workers."""
    straight = take(train_stream(dataset), 10)

    tail = take(train_stream(dataset, start=start), 10 - start, workers=workers)

    assert_same(tail, straight[start:])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_load_the_global_batches(damaged_set, world_size, accumulate):
    """Each a slice; joined in the order of ranks they are one process's batches, to the pixel."""
    whole = take(train_stream(damaged_set, batch_size=8, global_batch=8), 6)
    batch_size = 8 // world_size // accumulate

    by_rank = [
        concatenated_steps(
            take(
                train_stream(
                    damaged_set,
                    batch_size=batch_size,
                    global_batch=8,
                    rank=rank,
                    world_size=world_size,
                ),
                6 * accumulate,
            ),
            accumulate,
        )
        for rank in range(world_size)
    ]

    assert_same([concatenated(list(step)) for step in zip(*by_rank)], whole)


def concatenated_steps(batches: list[Batch], accumulate: int) -> list[Batch]:
    return [concatenated(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)]


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    batch_size=st.integers(1, 7),
    buffer=st.integers(1, 40),
)
def test_every_sample_comes_once_per_epoch(tmp_path_factory, sizes, batch_size, buffer):
    """For any shards, batch size and buffer: N batches of B are B epochs of N samples."""
    dataset = open_dataset(str(write_shards(tmp_path_factory.mktemp("once"), sizes)))
    num_samples = sum(sizes)
    order = train_order(dataset, global_batch=batch_size, buffer=buffer)
    stream = ShardStream(dataset, order, batch_size=batch_size, decode=False)

    samples = islice(stream, num_samples * batch_size)

    counts = Counter(sample["__key__"] for sample in samples)
    assert counts == {f"{i:04d}": batch_size for i in range(num_samples)}


@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [4, 23, 30])
def test_evaluation_sees_every_sample_once(dataset, workers, world_size, batch_size):
    """All ranks take the same number of full batches; the padding is not real."""
    by_rank = [
        list(
            make_loader(
                eval_stream(dataset, batch_size=batch_size, rank=rank, world_size=world_size),
                workers=workers,
            )
        )
        for rank in range(world_size)
    ]

    batches = [batch for step in zip(*by_rank, strict=True) for batch in step]
    seen = concatenated(batches)
    assert all(batch.images.shape == (batch_size, 3, 16, 16) for batch in batches)
    assert seen.is_real.sum() == 23
    assert seen.labels[seen.is_real].tolist() == [i % 4 for i in range(23)]
    assert not seen.images[~seen.is_real].any()


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


def test_a_replacement_moves_no_other_sample(dataset, damaged_set):
    """All other pixels and labels are those of the whole shards."""
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


def test_a_stream_that_decodes_needs_a_transform(dataset):
    """Said when it is made, not in a worker."""
    with pytest.raises(UsageError, match="a transform is missing"):
        ShardStream(dataset, train_order(dataset), batch_size=4)
