"""Laws of weighted orders: exact shares, floor or ceil for each sample, the same for any worker."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.weighting import Weighting, apportion


@st.composite
def weightings(draw) -> Weighting:
    num_groups = draw(st.integers(1, 5))
    group = np.array(
        draw(st.lists(st.integers(0, num_groups - 1), min_size=1, max_size=150)), np.int32
    )
    weights = draw(st.lists(st.floats(0, 10), min_size=num_groups, max_size=num_groups))
    weights = np.where(np.bincount(group, minlength=num_groups), np.array(weights) + 0.01, 0)
    total = draw(st.integers(1, 400))
    return Weighting(group, apportion(weights.tolist(), total), seed=draw(st.integers(0, 9)))


@st.composite
def orders(draw) -> TrainOrder:
    weighting = draw(weightings())
    num_samples = len(weighting.group)
    cuts = draw(st.lists(st.integers(0, num_samples), max_size=6))
    sizes = np.diff([0, *sorted(cuts), num_samples])
    return TrainOrder(
        sizes,
        seed=draw(st.integers(0, 9)),
        global_batch_size=draw(st.integers(1, 16)),
        shuffle_buffer=draw(st.integers(1, 500)),
        num_lanes=draw(st.integers(1, 5)),
        weighting=weighting,
    )


def samples_of(order: TrainOrder, epoch: int) -> np.ndarray:
    positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    return order.at(positions)[0].number


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(any),
    total=st.integers(1, 10**9),
)
def test_shares_are_quotas_rounded_and_sum_to_the_epoch(weights, total):
    shares = apportion(weights, total)

    assert shares.sum() == total
    assert (np.abs(shares - total * np.array(weights) / np.sum(weights)) < 1 + 1e-6 * total).all()


@settings(deadline=None, max_examples=60)
@given(order=orders(), epoch=st.integers(0, 20))
def test_every_group_has_its_share_and_every_sample_comes_floor_or_ceil_of_its_weight(order, epoch):
    """In each epoch, whatever the shards, the buffer and the lanes."""
    weighting = order.weighting
    number = samples_of(order, epoch)
    times = np.bincount(number, minlength=len(weighting.group))

    assert np.array_equal(
        np.bincount(weighting.group[number], minlength=len(weighting.shares)), weighting.shares
    )
    weight = (weighting.shares / np.maximum(weighting.sizes, 1))[weighting.group]
    assert (times >= np.floor(weight)).all() and (times <= np.ceil(weight)).all()


@settings(deadline=None, max_examples=30)
@given(weighting=weightings(), num_epochs=st.integers(1, 12))
def test_over_epochs_no_sample_of_a_group_is_ahead_of_another_by_more_than_one(
    weighting, num_epochs
):
    numbers = np.arange(len(weighting.group))
    times = sum(weighting.epoch(epoch).copies(numbers) for epoch in range(num_epochs))

    for group in set(weighting.group.tolist()):
        of_group = times[weighting.group == group]
        assert of_group.max() - of_group.min() <= 1


@settings(deadline=None, max_examples=30)
@given(weighting=weightings(), epoch=st.integers(0, 5))
def test_locate_and_starts_of_are_inverse(weighting, epoch):
    copies = weighting.epoch(epoch)
    places = np.arange(weighting.epoch_size)

    number, copy = copies.locate(places)

    assert (np.diff(number) >= 0).all()
    assert (copies.starts_of(number) + copy == places).all()
    assert (copy < copies.copies(number)).all() and (copy >= 0).all()


@settings(deadline=None, max_examples=30)
@given(order=orders())
def test_a_sample_is_found_where_it_comes(order):
    epochs = range(1, 4)
    for number in {0, len(order.weighting.group) - 1}:
        positions = order.positions_of(number, epochs)
        all_positions = np.arange(epochs[0] * order.num_samples, 4 * order.num_samples)
        comes = all_positions[order.at(all_positions)[0].number == number]

        assert positions.tolist() == comes.tolist()


@settings(deadline=None, max_examples=30)
@given(order=orders(), ranks=st.sampled_from([1, 2]))
def test_copies_have_keys_of_their_own_and_ranks_share_the_batch(order, ranks):
    positions = np.arange(3 * order.num_samples)
    refs, _ = order.at(positions)
    assert len(set(order.sample_keys(refs).tolist())) == len(positions)
    if order.global_batch_size % ranks == 0:
        parts = [
            order.micro_batch(
                5, batch_size=order.global_batch_size // ranks, rank=rank, world_size=ranks
            )
            for rank in range(ranks)
        ]
        whole = order.global_batch(5)
        assert np.concatenate([part.number for part in parts]).tolist() == whole.number.tolist()
        assert np.concatenate([part.copy for part in parts]).tolist() == whole.copy.tolist()


def test_without_a_weighting_and_with_one_that_changes_nothing_the_stream_is_the_same():
    sizes = np.array([30, 0, 17, 50])
    plain = TrainOrder(sizes, 3, 8, 20, 4)
    once = Weighting(np.zeros(97, np.int32), np.array([97]), seed=3)
    weighted = TrainOrder(sizes, 3, 8, 20, 4, once)

    for step in (0, 7, 40):
        ours, theirs = plain.global_batch(step), weighted.global_batch(step)
        assert ours.number.tolist() == theirs.number.tolist()
        assert plain.sample_keys(ours).tolist() == weighted.sample_keys(theirs).tolist()


def test_locality_holds_a_batch_reads_no_more_shards_than_lanes():
    """Copies are laid next to each other before windowing: the buffer alone decides."""
    num_shards, size = 200, 100
    group = np.arange(num_shards * size, dtype=np.int32) % 10
    shares = apportion([1, 1, 1, 1, 1, 1, 1, 1, 1, 31], num_shards * size)
    order = TrainOrder(np.full(num_shards, size), 0, 64, 512, 8, Weighting(group, shares, seed=0))
    shards = [len(set((order.global_batch(step).number // size).tolist())) for step in range(50)]

    assert max(shards) <= 24  # 8 lanes, in each the window of 64 reaches into at most 3 shards
    uniform = TrainOrder(np.full(num_shards, size), 0, 64, 10**6, 8, order.weighting)
    assert len(set((uniform.global_batch(0).number // size).tolist())) > 40


def test_a_golden_order():
    weighting = Weighting(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2], np.int32), np.array([4, 4, 4]), 0)
    order = TrainOrder(np.array([5, 4]), 0, 6, 6, 2, weighting)

    assert [order.global_batch(step).number.tolist() for step in range(2)] == GOLDEN


GOLDEN = [[1, 2, 6, 7, 8, 7], [5, 3, 6, 8, 8, 8]]


def test_a_group_without_samples_cannot_have_a_share():
    with pytest.raises(ValueError):
        Weighting(np.zeros(3, np.int32), np.array([2, 1]), seed=0)
