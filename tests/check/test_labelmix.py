"""The label mix that is announced is the one that training gets."""

from contextlib import closing

import numpy as np
import pytest
from conftest import write_shards

from wds_convnext.check.labelmix import (
    classes_per_batch,
    expected_classes,
    measure_label_mix,
    shards_opened,
)
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.order import TrainOrder

SORTED_LABELS = np.repeat(np.arange(100), 200)  # 20,000 samples
SIZES = np.full(50, 400)


def test_expected_classes_is_the_mean_of_random_batches():
    """Against drawing batches; classes of very different sizes, one of them empty."""
    counts = [500, 0, 100, 10, 1]
    labels = np.repeat(np.arange(5), counts)
    rng = np.random.default_rng(0)

    expected = expected_classes(counts, 20)

    drawn = [len(set(rng.choice(labels, 20, replace=False))) for _ in range(4_000)]
    assert abs(np.mean(drawn) - expected) < 4 * np.std(drawn) / np.sqrt(len(drawn))


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 1), (7, 3), (100, 3)])
def test_expected_classes_at_its_ends(batch_size, expected):
    """One sample has one class; all samples have all."""
    assert expected_classes([4, 2, 1], batch_size) == pytest.approx(expected)


def test_a_buffer_of_everything_mixes_like_a_uniform_order():
    """The mean over 125 batches, within four standard errors."""
    expected = expected_classes(np.bincount(SORTED_LABELS), 160)

    found = classes_per_batch(SORTED_LABELS, TrainOrder(SIZES, 0, 160, 20_000))

    assert abs(found - expected) < 4 * 2.9 / np.sqrt(125)


def test_the_mix_grows_with_the_buffer():
    """On shards sorted by class; the table has the usual sizes, the given one and all."""
    mix = measure_label_mix(SORTED_LABELS, SIZES, batch_size=160, shuffle_buffer=5_000)

    sizes = [buffer.shuffle_buffer for buffer in mix.buffers]
    classes = [buffer.classes_per_batch for buffer in mix.buffers]
    assert sizes == [1_000, 5_000, 10_000, 20_000]
    assert classes == sorted(classes)
    assert classes[0] < 0.6 * mix.expected_classes < classes[-1]
    assert len(mix.lines()) == 2 + 4


def test_buffers_over_the_data_set_are_one_line():
    """They all give the uniform order."""
    mix = measure_label_mix(SORTED_LABELS[:400], SIZES[:1], batch_size=16, shuffle_buffer=100_000)

    assert [buffer.shuffle_buffer for buffer in mix.buffers] == [400]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("max_open", [1, 3, 128])
def test_shards_are_opened_as_announced(tmp_path, world_size, max_open):
    """Counted by the reader itself, while it reads what rank 0 is due."""
    dataset = open_dataset(str(write_shards(tmp_path, [4, 3, 5, 1, 6])))
    order = TrainOrder(dataset.sizes, 0, 4 * world_size, 6, num_lanes=2)
    place = {"batch_size": 4, "world_size": world_size}

    announced = shards_opened(order, num_steps=40, max_open=max_open, **place)

    with closing(SampleReader(dataset, max_open=max_open)) as reader:
        for index in range(40):
            refs = order.micro_batch(index, rank=0, **place)
            for number in refs.number.tolist():
                reader.read(number)
        assert reader.num_opened == announced


def test_a_rank_with_its_own_lanes_opens_its_part_of_the_shards():
    """More ranks, fewer shards for each; a uniform order touches all of them anywhere."""
    sizes = np.full(640, 100)
    opened = {
        (ranks, buffer): shards_opened(
            TrainOrder(sizes, 0, 128, buffer),
            num_steps=400,
            batch_size=128 // ranks,
            world_size=ranks,
        )
        for ranks in (1, 4)
        for buffer in (3_200, 64_000)
    }

    assert opened[1, 3_200] < 2 * 400 * 128 / 100
    assert opened[4, 3_200] < 0.3 * opened[1, 3_200]
    assert opened[4, 64_000] > 10 * opened[4, 3_200]
