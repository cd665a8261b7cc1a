"""Laws of the order: permutations, exactly once, the same for any worker, rank and batch size."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import HANG_S
from hypothesis import given, settings
from hypothesis import strategies as st

from wds_convnext.errors import UsageError
from wds_convnext.rng import permute, subkeys, uniform
from wds_convnext.stream.order import EvalOrder, TrainOrder, ValidationSchedule

GOLDEN = {
    "windowed": [
        7,
        1,
        6,
        12,
        8,
        4,
        5,
        3,
        9,
        0,
        11,
        2,
        10,
        8,
        1,
        6,
        0,
        11,
        5,
        7,
        3,
        10,
        2,
        12,
        4,
        9,
    ],
    "uniform": [12, 5, 7, 0, 9, 2, 10, 3, 6, 8, 11, 4, 1],
    "draws": [[0.12036925998854198, 0.6317788482021437], [0.42143663712225254, 0.7356086176968438]],
}

shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


def make_order(sizes, *, batch=4, buffer=16, seed=0, lanes=4) -> TrainOrder:
    return TrainOrder(np.array(sizes), seed, batch, buffer, lanes)


@given(size=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    """Every index is hit once."""
    assert (np.sort(permute(np.arange(size), size, key)) == np.arange(size)).all()


def test_permute_is_uniform_over_all_orders_of_five():
    """Chi-square over the 120 orders of 5, 60,000 keys; fixed keys, so this never flickers."""
    num_keys = 60_000
    keys = subkeys(1, np.arange(num_keys))
    columns = np.stack([permute(np.full(num_keys, i), 5, keys) for i in range(5)], axis=1)
    counts = np.unique(columns @ 5 ** np.arange(5), return_counts=True)[1]

    expected = num_keys / 120
    chi_square = ((counts - expected) ** 2 / expected).sum()

    assert len(counts) == 120
    assert 119 - 4 * np.sqrt(2 * 119) < chi_square < 119 + 4 * np.sqrt(2 * 119)


def test_a_buffer_of_the_whole_set_is_a_uniform_permutation():
    """Where one sample stands, which samples are neighbours, and how many stay, over epochs."""
    size, num_epochs = 200, 4000
    order = make_order([50] * 4, buffer=size, batch=size)
    epochs = np.stack([order.at(np.arange(size) + e * size)[0].number for e in range(num_epochs)])

    places_of_7 = np.bincount(np.argmax(epochs == 7, axis=1), minlength=size)
    steps = np.bincount(np.diff(epochs, axis=1).ravel() % size, minlength=size)[1:]
    fixed_points = (epochs == np.arange(size)).sum(axis=1)

    for counts in (places_of_7, steps):
        expected = counts.mean()
        degrees = len(counts) - 1
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)
    # The number of fixed points of a uniform permutation is Poisson with mean and variance 1.
    assert abs(fixed_points.mean() - 1) < 5 / np.sqrt(num_epochs)
    assert abs(fixed_points.var() - 1) < 0.2


def test_a_buffer_of_the_whole_set_mixes_sorted_classes_like_a_uniform_order():
    """Distinct classes per batch of 64 over 100 classes stored in order: 47.4 expected."""
    order = make_order([1000] * 10, buffer=10_000, batch=64)
    classes = [len(set(order.global_batch(step).number // 100)) for step in range(300)]

    expected = 100 * (1 - (1 - 1 / 100) ** 64)
    assert abs(np.mean(classes) - expected) < 0.7


@given(
    sizes=shard_sizes,
    batch=st.integers(1, 40),
    buffer=st.integers(1, 400),
    lanes=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_sample_comes_exactly_once_per_epoch(sizes, batch, buffer, lanes, seed):
    """Among positions 0 ... E*N - 1 each sample comes E times; no batch is short."""
    num_epochs, total = 3, sum(sizes)
    order = make_order(sizes, batch=batch, buffer=buffer, lanes=lanes, seed=seed)
    batches = [order.global_batch(step) for step in range(order.num_steps(num_epochs))]

    number = np.concatenate([b.number for b in batches])
    epoch = np.concatenate([b.epoch for b in batches])

    assert all(len(b) == batch for b in batches)
    for e in range(num_epochs):
        assert (np.sort(number[epoch == e]) == np.arange(total)).all()


@given(
    sizes=shard_sizes,
    world=st.sampled_from([1, 2, 3, 4]),
    accumulate=st.integers(1, 3),
    batch=st.integers(1, 5),
    buffer=st.integers(1, 400),
)
def test_ranks_share_the_same_global_batches(sizes, world, accumulate, batch, buffer):
    """The micro-batches of all ranks, in order, are the global batch of one rank."""
    global_batch = batch * accumulate * world
    order = make_order(sizes, batch=global_batch, buffer=buffer)

    for step in range(4):
        parts = [
            order.micro_batch(
                step * accumulate + micro, batch_size=batch, rank=rank, world_size=world
            ).number
            for rank in range(world)
            for micro in range(accumulate)
        ]
        assert (np.concatenate(parts) == order.global_batch(step).number).all()


def test_ranks_that_do_not_divide_the_global_batch_are_refused():
    with pytest.raises(UsageError, match="global batch of 10"):
        make_order([20], batch=10).micro_batch(0, batch_size=3, rank=0, world_size=3)


@given(sizes=shard_sizes, batch=st.integers(1, 9), world=st.integers(1, 4), start=st.integers(0, 3))
def test_evaluation_sees_every_sample_once_on_any_ranks(sizes, batch, world, start):
    """Real references of all ranks are all samples once; every rank has as many batches."""
    order = EvalOrder(np.array(sizes))
    num_batches = order.num_micro_batches(batch_size=batch, world_size=world)
    refs = [
        order.micro_batch(i, batch_size=batch, rank=rank, world_size=world)
        for rank in range(world)
        for i in range(num_batches)
    ]

    number = np.concatenate([r.number[r.is_real] for r in refs])
    assert (np.sort(number) == np.arange(sum(sizes))).all()
    assert all(len(r) == batch for r in refs)


@given(positions=st.lists(st.integers(0, 10_000), min_size=1, max_size=30))
def test_a_position_does_not_depend_on_what_was_asked_before(positions):
    """Any position is reached directly: the same sample alone, in a list, in another order."""
    order, other = make_order([30, 5, 50]), make_order([30, 5, 50])
    together, _ = order.at(np.array(positions))

    for i in reversed(range(len(positions))):
        alone, _ = other.at(np.array(positions[i : i + 1]))
        assert alone.number[0] == together.number[i]


def test_epochs_and_seeds_have_different_orders():
    one, two = make_order([40, 40], seed=1), make_order([40, 40], seed=2)
    first, second = one.at(np.arange(80))[0].number, one.at(np.arange(80, 160))[0].number

    assert (first != second).any()
    assert (first != two.at(np.arange(80))[0].number).any()
    assert (first != np.arange(80)).any()


def test_a_rank_reads_only_its_own_lanes():
    """Where ranks divide lanes and lanes divide the batch, ranks share no lane within an epoch."""
    order = make_order([100] * 16, batch=32, buffer=64, lanes=16)
    lanes_of = [set() for _ in range(4)]
    for step in range(order.num_steps(1) - 1):
        refs, lane = order.at(np.arange(step * 32, step * 32 + 32))
        lane = np.sort(lane, kind="stable")
        for rank in range(4):
            lanes_of[rank] |= set(lane[rank * 8 : rank * 8 + 8])

    assert [sorted(lanes) for lanes in lanes_of] == [
        list(range(r * 4, r * 4 + 4)) for r in range(4)
    ]


def test_a_small_buffer_moves_a_sample_by_about_the_buffer():
    """Windows of a lane: a sample is at most 1.5 windows from its place in the stored order."""
    order = make_order([4000], batch=10, buffer=400, lanes=4)
    number = order.at(np.arange(4000))[0].number

    moved = np.abs(np.arange(4000) // 4 - number % 1000)
    assert moved.max() <= 150
    assert moved.mean() > 25


def test_steps_and_epochs_meet():
    """Epoch e ends after step ceil((e + 1) N / G) - 1, and a run has ceil(E N / G) steps."""
    order = make_order([7, 3], batch=4)

    assert [order.epoch_of(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [list(order.steps_of(epoch)) for epoch in range(3)] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert order.num_steps(3) == 8


@given(
    sizes=shard_sizes,
    batch=st.integers(1, 40),
    epochs=st.integers(1, 12),
    every=st.integers(1, 5),
    max_steps=st.integers(1, 60),
)
def test_validation_is_due_at_the_ends_of_its_epochs_and_of_the_run(
    sizes, batch, epochs, every, max_steps
):
    """Epoch 0, every, 2 * every …, where a step ends them, and once at the last step."""
    order = make_order(sizes, batch=batch)
    last_step = min(order.num_steps(epochs), max_steps)
    schedule = ValidationSchedule(order, every=every, last_step=last_step)

    due = [step for step in range(1, last_step + 1) if schedule.is_due(step)]

    ends = {order.num_steps(e + 1) for e in range(0, epochs, every) if order.steps_of(e)}
    assert due == sorted({end for end in ends if end <= last_step} | {last_step})


def test_golden_order():
    """A change of the order breaks every resume: it has to be seen, and meant."""
    order = make_order([5, 0, 1, 7], batch=4, buffer=6, seed=3, lanes=2)
    uniform_order = make_order([5, 0, 1, 7], batch=4, buffer=13, seed=3)

    assert order.at(np.arange(26))[0].number.tolist() == GOLDEN["windowed"]
    assert uniform_order.at(np.arange(13))[0].number.tolist() == GOLDEN["uniform"]
    assert uniform(subkeys(5, [0, 7]), 2).tolist() == GOLDEN["draws"]


def test_order_imports_only_numpy_and_opens_no_file():
    """In a process of its own: no torch, and no open() while the order is computed."""
    code = (
        "import sys, numpy as np\n"
        "from wds_convnext.stream.order import TrainOrder\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(args) if event == 'open' else None)\n"
        "TrainOrder(np.full(1000, 1400), 0, 256, 10_000).global_batch(10**6)\n"
        "assert 'torch' not in sys.modules and not opened, opened\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)


@settings(max_examples=20)
@given(sizes=shard_sizes, buffer=st.integers(1, 80), batch=st.integers(1, 50), seed=st.integers(0))
def test_a_sample_is_found_where_the_order_has_it(sizes, buffer, batch, seed):
    """`positions_of` is the inverse of `at`, and `place_in_batch` says where ranks get it."""
    order = make_order(sizes, batch=batch, buffer=buffer, seed=seed)
    epochs = range(2)

    for number in {0, order.num_samples // 2, order.num_samples - 1}:
        positions = order.positions_of(number, epochs)

        refs, _ = order.at(positions)
        assert set(refs.number.tolist()) == {number} and refs.epoch.tolist() == [*epochs]
        for position, epoch in zip(positions.tolist(), epochs):
            batch_refs = order.global_batch(position // batch)
            place = order.place_in_batch(position)
            assert (batch_refs.number[place], batch_refs.epoch[place]) == (number, epoch)


@settings(max_examples=30)
@given(
    sizes=shard_sizes,
    buffer=st.integers(1, 80),
    batch=st.integers(1, 20),
    repeats=st.integers(2, 4),
)
def test_repeats_are_the_order_itself_with_each_position_several_times(
    sizes, buffer, batch, repeats
):
    """In a row, numbered from 0, each with a key of its own; copy 0 has the key of today."""
    once = make_order(sizes, batch=batch, buffer=buffer)
    order = replace(once, repeats=repeats)
    positions = np.arange(3 * repeats * once.num_samples)

    refs, lane = order.at(positions)

    expected, lane_once = once.at(np.arange(3 * once.num_samples))
    assert np.array_equal(refs.number, np.repeat(expected.number, repeats))
    assert np.array_equal(lane, np.repeat(lane_once, repeats))
    assert np.array_equal(refs.copy, positions % repeats)
    keys = order.sample_keys(refs)
    assert len(set(keys.tolist())) == len(keys)
    assert np.array_equal(keys[::repeats], once.sample_keys(expected))
    assert order.num_samples == once.num_samples and order.num_steps(2) == once.num_steps(2)


@settings(max_examples=30)
@given(
    sizes=shard_sizes,
    buffer=st.integers(1, 80),
    batch=st.integers(1, 20),
    repeats=st.integers(1, 4),
    start=st.integers(0, 5),
)
def test_repeated_samples_are_found_where_the_order_has_them(sizes, buffer, batch, repeats, start):
    """`positions_of`, `place_in_batch` and `pieces_of`, in epochs that are parts of a pass."""
    order = replace(make_order(sizes, batch=batch, buffer=buffer), repeats=repeats)
    epochs = range(start, start + 2)
    positions = np.arange(epochs.start * order.num_samples, epochs.stop * order.num_samples)
    refs, _ = order.at(positions)
    shard = np.searchsorted(np.cumsum(sizes), refs.number, side="right")

    for number in {0, order.num_samples // 2, order.num_samples - 1}:
        found = order.positions_of(number, epochs)
        assert found.tolist() == positions[refs.number == number].tolist()
        for position in found.tolist():
            batch_refs = order.global_batch(position // batch)
            place, (at, _) = order.place_in_batch(position), order.at(np.array([position]))
            assert batch_refs.number[place] == number and batch_refs.copy[place] == at.copy[0]
    for epoch in epochs:
        pieces = order.pieces_of(epoch)
        for position, needed in zip(positions.tolist(), shard.tolist()):
            if position // order.num_samples == epoch:
                covers = (pieces.first <= position) & (position <= pieces.last)
                assert needed in pieces.shard[covers]
