"""The learning rate: its formula, its rules for other batches, and a run's warm-up and odd ways."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adamp import random_params
from timm.scheduler import CosineLRScheduler

from wds_convnext.config import TrainConfig
from wds_convnext.stream.order import TrainOrder
from wds_convnext.training.schedule import lr_at, lr_schedule, scaled_lr, schedule_notes

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


runs = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-6, 1.0),
        "total_steps": st.integers(2, 5000),
        "warmup_steps": st.integers(0, 4000),
        "warmup_lr": st.floats(0, 1e-6),
        "min_lr": st.floats(0, 1e-6),
    }
).filter(lambda run: run["warmup_steps"] < run["total_steps"] - 1)


@given(runs)
def test_lr_meets_both_ends_exactly(run):
    """warmup_lr at step 0, lr at the end of the warm-up, min_lr at the last step; no rounding."""
    first = run["warmup_lr"] if run["warmup_steps"] else run["lr"]

    assert lr_at(0, **run) == first
    assert lr_at(run["warmup_steps"], **run) == run["lr"]
    assert lr_at(run["total_steps"] - 1, **run) == run["min_lr"]


@given(runs)
def test_lr_rises_then_falls(run):
    """Up to the end of the warm-up it never falls, after it never rises (but for rounding)."""
    rates = [lr_at(step, **run) for step in range(run["total_steps"])]
    peak = run["warmup_steps"]

    assert all(a <= b * (1 + 1e-12) for a, b in zip(rates[:peak], rates[1 : peak + 1]))
    assert all(b <= a * (1 + 1e-12) for a, b in zip(rates[peak:], rates[peak + 1 :]))


@settings(max_examples=30)
@given(runs)
def test_lr_is_timms_cosine_of_the_right_length(run):
    """timm's schedule gives it, once the cosine is told to end at the last step."""
    optimizer = torch.optim.SGD(random_params([()]), lr=run["lr"])
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=run["total_steps"] - 1 - run["warmup_steps"],
        lr_min=run["min_lr"],
        warmup_t=run["warmup_steps"],
        warmup_lr_init=run["warmup_lr"],
        warmup_prefix=True,
        t_in_epochs=False,
    )

    for step in range(0, run["total_steps"], max(1, run["total_steps"] // 50)):
        scheduler.step_update(step)
        assert lr_at(step, **run) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_lr_of_short_runs():
    """One step has the full rate; a run shorter than its warm-up stays on the ramp."""
    rates = {"lr": 1.0, "warmup_lr": 0.0, "min_lr": 0.1}

    assert lr_at(0, total_steps=1, warmup_steps=0, **rates) == 1.0
    assert [lr_at(s, total_steps=3, warmup_steps=4, **rates) for s in range(3)] == [0, 0.25, 0.5]
    assert [lr_at(s, total_steps=3, warmup_steps=2, **rates) for s in range(3)] == [0, 0.5, 1.0]
    assert lr_at(9, total_steps=3, warmup_steps=1, **rates) == 0.1


def test_lr_of_the_articles_run():
    """Golden: batch 160 of 50,000 images, 300 epochs, 5 of them warm-up."""
    run = {
        "lr": 4e-3,
        "total_steps": 93750,
        "warmup_steps": 1562,
        "warmup_lr": 1e-6,
        "min_lr": 2e-6,
    }

    rates = [lr_at(step, **run) for step in (0, 781, 1562, 47655, 93749)]

    assert rates == pytest.approx([1e-6, 2.0005e-3, 4e-3, 2.00106e-3, 2e-6], rel=1e-4)


@pytest.mark.parametrize(("rule", "expected"), [("none", 4.0), ("linear", 0.25), ("sqrt", 1.0)])
def test_scaled_lr(rule, expected):
    """A 16th of the batch: nothing, a 16th, or a quarter of the learning rate."""
    assert scaled_lr(4.0, rule=rule, global_batch_size=256, reference_batch_size=4096) == expected


def test_scaled_lr_names_the_rules_it_knows():
    """Found and expected are both in the message."""
    with pytest.raises(ValueError, match="'cubic': expected one of none, linear, sqrt"):
        scaled_lr(1.0, rule="cubic", global_batch_size=1, reference_batch_size=1)
