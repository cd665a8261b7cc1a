"""When a run needs which shard."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.stream.order import EvalOrder, TrainOrder, ValidationSchedule
from wds_convnext.stream.plan import Ranks, RunPlan, largest_buffer
from wds_convnext.stream.weighting import Weighting


def make_run(
    sizes,
    *,
    batch=4,
    accumulate=1,
    ranks=(0, 1, 1),
    buffer=8,
    lanes=3,
    epochs=3,
    weighted=False,
    repeats=1,
):
    first, stop, world = ranks
    order = TrainOrder(
        np.array(sizes), 7, batch * accumulate * world, buffer, lanes, repeats=repeats
    )
    if weighted:  # the first samples three times an epoch, the last hardly
        group = np.sort(np.arange(sum(sizes), dtype=np.int32) % 2)
        shares = np.where(np.bincount(group, minlength=2), [3 * (group == 0).sum(), 1], 0)
        order = replace(order, weighting=Weighting(group, shares, seed=0))
    schedule = ValidationSchedule(order, 2, order.num_steps(epochs))
    return RunPlan(order, Ranks(batch, first, stop, world), schedule, EvalOrder(np.array([5, 3])))


def batches_of(run, rank):
    """The shards of each batch that a rank is handed, as the loader makes them."""
    place = {"batch_size": run.ranks.batch_size, "rank": rank, "world_size": run.ranks.world_size}
    ends, val_ends = np.cumsum(run.order.sizes), np.cumsum(run.val_order.sizes)

    def validation():
        for i in range(run.num_val_batches):
            number = run.val_order.micro_batch(i, **place).number
            yield set((len(ends) + np.searchsorted(val_ends, number, side="right")).tolist())

    for micro in range(run.schedule.last_step * run.accumulate):
        number = run.order.micro_batch(micro, **place).number
        yield set(np.searchsorted(ends, number, side="right").tolist())
        step, rest = divmod(micro + 1, run.accumulate)
        if not rest and run.schedule.is_due(step):
            yield from validation()
    yield from validation()  # the evaluation after the last step


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([(0, 1, 1), (0, 2, 2), (1, 2, 2), (2, 4, 4)]),
    st.sampled_from([1, 5, 8, 100]),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 4),
)
def test_every_batch_finds_its_shards_in_the_plan(
    sizes, batch, accumulate, ranks, buffer, lanes, weighted, repeats
):
    """Whatever sizes, ranks, windows, lanes, weights, repeats: what a rank reads is planned."""
    run = make_run(
        sizes,
        batch=batch,
        accumulate=accumulate,
        ranks=ranks,
        buffer=buffer,
        lanes=lanes,
        weighted=weighted,
        repeats=repeats,
    )
    uses = run.uses()

    for rank in range(ranks[0], ranks[1]):
        for time, needed in enumerate(batches_of(run, rank)):
            planned = uses.object[(uses.first <= time) & (time <= uses.last)]

            assert needed <= set(planned.tolist())


@pytest.mark.parametrize("step", [0, 5, 11, 24])
def test_a_plan_from_a_later_step_is_the_rest_of_the_plan(step):
    """Also from the last one on, which ends an epoch to the sample: the evaluation is left."""
    run = make_run([9, 8, 9, 6])
    assert run.schedule.last_step == 24 and 24 * 4 == 3 * 32
    whole, rest = run.uses(), run.uses(from_step=step)
    start = run.start(step, validates_first=False)

    for time in range(start, int(run.time_of(run.schedule.last_step)) + run.num_val_batches):
        now, later = (
            p.object[(p.first <= time) & (time <= p.last)].tolist() for p in (whole, rest)
        )
        assert now == later


def test_a_small_buffer_needs_few_shards_at_one_time():
    """A use spans a shard and two windows of its lane, not the epoch."""
    run = make_run([100] * 50, batch=10, buffer=100, lanes=5)
    bytes_of = np.full(52, 10)

    live = run.uses().peak_bytes(bytes_of) // 10

    assert 5 <= live <= 20
    assert make_run([100] * 50, batch=10, buffer=5000).uses().peak_bytes(bytes_of) == 500


def test_the_largest_buffer_fits_and_the_next_does_not():
    run = make_run([100] * 50, batch=10, buffer=5000, lanes=5, epochs=2)
    bytes_of = np.full(52, 10)

    buffer = largest_buffer(run, bytes_of, 300, ahead=2)

    def peak(size):
        return (
            make_run([100] * 50, batch=10, buffer=size, lanes=5, epochs=2)
            .uses()
            .begun(2)
            .peak_bytes(bytes_of)
        )

    assert peak(buffer) <= 300 < peak(int(buffer * 1.1) + 1)
    assert largest_buffer(run, bytes_of, 40, ahead=2) is None
