"""One stream of batches for any workers, ranks and starts; bad samples are part of it."""

import multiprocessing
import time
from collections import Counter
from itertools import islice

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
    concatenated,
    eval_stream,
    take,
    train_order,
    train_stream,
    write_damaged,
)

from wds_convnext.errors import UsageError
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
    return write_damaged(tmp_path)


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


def test_a_stream_that_decodes_needs_a_transform(dataset):
    """Said when it is made, not in a worker."""
    with pytest.raises(UsageError, match="a transform is missing"):
        ShardStream(dataset, train_order(dataset), batch_size=4)
