"""Image sizes that rise in a run: arithmetic of the step, the same pixels whoever makes them."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import write_shards
from streams import SIZES, TRAIN, assert_same, take, train_order

from wds_convnext.errors import UsageError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.sizes import ImageSizes
from wds_convnext.stream.stream import ShardStream

RISING = ImageSizes((8, 12, 16), first_steps=(0, 2, 5))


def test_counts_are_those_of_each_step():
    for start, stop in itertools.product(range(9), repeat=2):
        steps = range(start, stop)
        sizes = [RISING.at(step) for step in steps]

        assert RISING.num_steps(steps) == {size: sizes.count(size) for size in sorted(set(sizes))}
        assert RISING.num_pixels(steps) == sum(size**2 for size in sizes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(str(write_shards(tmp_path_factory.mktemp("data"), SIZES)))


def stream(dataset, *, transform=TRAIN, sizes: ImageSizes | None = RISING, start=0, rank=0):
    """Two ranks with two batches a step."""
    order = train_order(dataset, global_batch=8)
    place = {"batch_size": 2, "rank": rank, "world_size": 2}
    return ShardStream(dataset, order, transform=transform, sizes=sizes, start=start, **place)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_step_has_the_images_of_a_stream_of_its_size(dataset, rank, erasing):
    """And so their order, labels and boxes of erasing."""
    transform = replace(TRAIN, random_erasing=erasing)
    batches = take(stream(dataset, transform=transform, rank=rank), 14)

    of_size = {
        size: take(
            stream(dataset, transform=replace(transform, image_size=size), sizes=None, rank=rank),
            14,
        )
        for size in RISING.sizes
    }
    expected = [of_size[RISING.at(number // 2)][number] for number in range(14)]
    assert [b.images.shape[-1] for b in batches] == [8] * 4 + [12] * 6 + [16] * 4
    assert_same(batches, expected)
    for batch, other in zip(batches, expected):
        assert (batch.erasures is None) == (erasing == 0)
        assert batch.erasures is None or torch.equal(batch.erasures, other.erasures)


@pytest.mark.parametrize(("workers", "start"), [(1, 3), (3, 0)])
def test_workers_and_a_later_start_change_no_pixel(dataset, workers, start):
    straight = take(stream(dataset), 14)

    assert_same(take(stream(dataset, start=start), 14 - start, workers=workers), straight[start:])


def test_sizes_are_those_of_the_transform(dataset):
    with pytest.raises(UsageError, match="need a TrainTransform of the last"):
        stream(dataset, transform=replace(TRAIN, image_size=20))
    with pytest.raises(UsageError, match="need a TrainTransform of the last"):
        stream(dataset, transform=lambda data: torch.zeros(3, 16, 16))
