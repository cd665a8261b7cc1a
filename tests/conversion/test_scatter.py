"""The scatter shuffle deals every row to one place, and every class evenly."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.conversion.scatter import Scatter, ranks_in_class

label_lists = st.lists(st.integers(0, 4), min_size=1, max_size=300)


def destinations(labels, num_shards, seed=0):
    labels = np.array(labels)
    counts = np.bincount(labels, minlength=5)
    scatter = Scatter(counts, num_shards, seed, "train")
    return scatter.destination(labels, ranks_in_class(labels, np.zeros(5, dtype=np.int64)))


@given(labels=label_lists, num_shards=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_place_of_every_shard_is_taken_once(labels, num_shards, seed):
    """Shards differ by at most one sample, and their places are 0, 1, …, without holes."""
    shards, places = destinations(labels, num_shards, seed)

    sizes = np.bincount(shards, minlength=num_shards)
    assert sizes.max() - sizes.min() <= 1
    for shard, size in enumerate(sizes):
        assert sorted(places[shards == shard]) == list(range(size))


@given(labels=label_lists, num_shards=st.integers(1, 20))
def test_every_shard_is_a_fair_sample_of_the_whole(labels, num_shards):
    """The samples of a class differ by at most one between shards."""
    shards, _ = destinations(labels, num_shards)

    for label in set(labels):
        sizes = np.bincount(shards[np.array(labels) == label], minlength=num_shards)
        assert sizes.max() - sizes.min() <= 1


@given(labels=label_lists, cut=st.integers(0, 300))
def test_ranks_count_on_over_parts(labels, cut):
    """The ranks of a split do not depend on where it is cut."""
    labels = np.array(labels)
    nothing = np.zeros(5, dtype=np.int64)
    head, tail = labels[:cut], labels[cut:]

    parts = [
        ranks_in_class(head, nothing),
        ranks_in_class(tail, np.bincount(head, minlength=5)),
    ]

    np.testing.assert_array_equal(np.concatenate(parts), ranks_in_class(labels, nothing))


def test_class_sorted_rows_come_out_mixed_and_the_seed_decides():
    """In 10,000 rows sorted by class, neighbours in a shard share it about one time in five."""
    labels = np.repeat(np.arange(5), 2000)

    shards, places = destinations(labels, 4)
    others, _ = destinations(labels, 4, seed=1)

    order = np.lexsort((places, shards))
    agree = np.mean(labels[order][1:] == labels[order][:-1])
    assert abs(agree - 0.2) < 0.02  # five standard deviations of 10,000 draws
    assert np.mean(shards == others) < 0.5


def test_golden_order():
    """Shards made today and in a later version are the same: 12 rows of 3 classes, 2 shards."""
    shards, places = destinations([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], 2, seed=7)

    assert shards.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0]
    assert places.tolist() == [1, 2, 4, 5, 4, 3, 3, 2, 1, 0, 5, 0]
