"""A loss or a gradient that is not finite changes nothing, and ends the run or is left out."""

import copy
import json
import math
from contextlib import closing

import pytest
import torch
from test_train import ORDER, make_batch, make_step, run_config

from wds_convnext.errors import TrainingError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.training import step as step_module
from wds_convnext.training.step import train_step
from wds_convnext.training.train import train


def trained(state) -> dict:
    """A copy of weights, optimizer state and average: what a step that failed must not change."""
    kept = ("model", "optimizer", "ema")
    content = copy.deepcopy({name: state.state_dict()[name] for name in kept})
    del content["optimizer"]["param_groups"]  # the learning rate is set, not trained
    return content


def assert_equal(one: dict, other: dict) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def poison(monkeypatch):
    """A function: make the images of these steps NaN."""
    clean = step_module.augment_on_device

    def at(*steps: int) -> None:
        def augment(batch, *, key, recipe):
            images, targets = clean(batch, key=key, recipe=recipe)
            return images * (math.nan if key[1] in steps else 1), targets

        monkeypatch.setattr(step_module, "augment_on_device", augment)

    return at


@pytest.mark.bits
def test_from_a_nonfinite_step_on_nothing_changes(poison):
    """Weights, moments, step counts and average are those before it, also after later steps."""
    poison(2)
    state, recipe = make_step(ema_decay=0.9)
    for number in range(2):
        train_step(state, [make_batch(number)], lr=1e-3, recipe=recipe)
    before = trained(state)

    for number in range(2, 5):
        train_step(state, [make_batch(number)], lr=1e-3, recipe=recipe)

    assert_equal(trained(state), before)
    assert state.sums.read().failed_step == 2


@pytest.mark.bits
def test_skipping_leaves_out_a_nonfinite_step_and_goes_on(poison):
    """The skipped step changes nothing and is in no mean; the next one trains."""
    poison(1)
    state, recipe = make_step(ema_decay=0.9, on_nonfinite="skip")
    loss = train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    before = trained(state)

    train_step(state, [make_batch(1)], lr=1e-3, recipe=recipe)
    skipped = trained(state)
    interval = state.sums.read()
    train_step(state, [make_batch(2)], lr=1e-3, recipe=recipe)

    assert_equal(skipped, before)
    assert (interval.num_steps, interval.num_skipped, interval.last_failed) == (2, 1, 1)
    assert interval.loss == pytest.approx(loss.item())
    assert state.sums.read().failed_step == -1
    weight = "head.fc.weight"
    assert not torch.equal(state.model.state_dict()[weight], before["model"][weight])


def test_skipping_ends_at_max_skips_in_a_row(poison):
    """Two in a row are allowed: 1 and 2 pass, then 4, 5 and 6 end the run at 6."""
    poison(1, 2, 4, 5, 6)
    state, recipe = make_step(on_nonfinite="skip", max_skips=2)

    failed_steps = []
    for number in range(8):
        train_step(state, [make_batch(number)], lr=1e-3, recipe=recipe)
        failed_steps.append(state.sums.read().failed_step)

    assert failed_steps == [-1] * 6 + [6, 6]


def test_running_statistics_do_not_take_up_a_skipped_step(poison):
    """A model with BatchNorm: its buffers stay finite, and as they were."""
    poison(1)
    state, recipe = make_step(model="test_efficientnet", on_nonfinite="skip")
    train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    before = trained(state)

    train_step(state, [make_batch(1)], lr=1e-3, recipe=recipe)

    assert any(name.endswith("running_mean") for name in before["model"])
    assert_equal(trained(state), before)


def test_an_overflow_of_the_scaled_gradient_only_skips():
    """GradScaler's own event: nothing changes, the scale is halved, and the run goes on."""
    state, recipe = make_step(ema_decay=0.9)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = state.model.head.fc.weight
    weight.register_hook(lambda grad: grad * math.inf if state.step == 1 else grad)
    train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    before = trained(state)

    train_step(state, [make_batch(1)], lr=1e-3, recipe=recipe)
    skipped, scale = trained(state), state.scaler.get_scale()
    train_step(state, [make_batch(2)], lr=1e-3, recipe=recipe)

    assert_equal(skipped, before)
    assert scale == 512.0
    interval = state.sums.read()
    assert (interval.num_steps, interval.num_skipped, interval.failed_step) == (3, 1, -1)
    assert not torch.equal(weight, before["model"]["head.fc.weight"])


def keys_of_step(shards, step: int) -> list[str]:
    train_data = open_dataset(str(shards / "train.json"))
    refs = TrainOrder(train_data.sizes, **ORDER).global_batch(step)
    with closing(SampleReader(train_data)) as reader:
        return [reader.key(number) for number in refs.number.tolist()]


@pytest.mark.parametrize("save_every", [1000, 1])
def test_a_run_that_fails_names_the_step_and_its_samples(shards, tmp_path, poison, save_every):
    """With shard and key; and no checkpoint is written from a frozen state."""
    poison(4)
    config = run_config(shards, tmp_path, log_every=100, save_every=save_every)

    with pytest.raises(TrainingError, match="step 4 is not finite") as failure:
        train(config)

    keys = keys_of_step(shards, 4)
    assert len(keys) == 8
    assert all(f"tar, key {key}" in str(failure.value) for key in keys)
    assert not (tmp_path / "run" / "step-000000005.pt").exists()
    assert (tmp_path / "run" / "step-000000004.pt").exists() == (save_every == 1)


def test_a_run_that_skips_says_which_samples(shards, tmp_path, capsys, poison):
    """One line with the step and its keys; the run finishes, and metrics.jsonl has the count."""
    poison(4)
    config = run_config(shards, tmp_path, on_nonfinite="skip", epochs=1)

    assert train(config) == 0

    line = next(line for line in capsys.readouterr().out.splitlines() if "step 4 is" in line)
    assert all(key in line for key in keys_of_step(shards, 4))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    skipped = [json.loads(line).get("train/skipped_steps", 0) for line in metrics]
    assert sum(skipped) == 1
