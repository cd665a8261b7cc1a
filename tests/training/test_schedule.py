"""The learning rate of a run that is not told how to warm up, and what is said about odd ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.config import TrainConfig
from wds_convnext.stream.order import TrainOrder
from wds_convnext.training.schedule import lr_schedule, schedule_notes

ORDER = TrainOrder(np.array([500]), seed=0, global_batch_size=10, shuffle_buffer=500)


@given(st.integers(1, 400))
def test_a_run_of_any_length_reaches_its_peak_and_its_minimum(epochs):
    config = TrainConfig(epochs=epochs)
    rate = lr_schedule(config, ORDER)
    rates = [rate(step) for step in range(ORDER.num_steps(epochs))]

    assert max(rates) == config.lr
    assert rates[-1] == config.min_lr
    assert rates.index(config.lr) <= len(rates) / 3


@pytest.mark.parametrize(
    ("options", "warmup_epochs"),
    [
        ({"epochs": 300}, 5),
        ({"epochs": 16}, 5),
        ({"epochs": 15}, 1.5),
        ({"epochs": 2}, 0.2),
        ({"epochs": 2, "warmup_epochs": 5}, 5),
        ({"epochs": 2, "warmup_epochs": 0}, 0),
    ],
)
def test_a_warm_up_is_a_tenth_of_a_short_run_unless_it_is_given(options, warmup_epochs):
    assert TrainConfig(**options).warmup_epochs == pytest.approx(warmup_epochs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 300}, []),
        ({"epochs": 2}, ["Warm-up: 0.2 epochs, a tenth of the run"]),
        ({"epochs": 5, "warmup_epochs": 5}, ["only rises: --warmup-epochs 5 is not less than"]),
        ({"epochs": 300, "max_steps": 10}, ["the last learning rate is 1.45e-04, not 2.00e-06"]),
        ({"epochs": 300, "max_steps": 15_000}, []),
    ],
)
def test_a_rate_that_goes_an_odd_way_is_said(options, said):
    notes = schedule_notes(TrainConfig(**options), ORDER)

    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes))
