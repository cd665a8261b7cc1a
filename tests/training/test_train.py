"""What a run computes: one clipped update a step, at the formula's rate; and what it validates."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_RUN
from timm.optim import AdamP as TimmAdamP
from torch import nn

from wds_convnext.config import EvalConfig, TrainConfig
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream
from wds_convnext.stream.transforms import Preprocessing, TrainTransform
from wds_convnext.training import loop
from wds_convnext.training.adamp import parameter_groups
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.optimizer import keep_lr_on_device
from wds_convnext.training.schedule import lr_at, lr_schedule
from wds_convnext.training.state import build_state
from wds_convnext.training.step import build_recipe, train_step
from wds_convnext.training.train import train

NUM_CLASSES = 4
ORDER = {"seed": 0, "global_batch_size": 8, "shuffle_buffer": 16}
NO_MIXING = {"mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0}


def tiny_config(**options) -> TrainConfig:
    """TINY_RUN as a config of the trainer itself; options by their names in it."""
    tiny = {flag.removeprefix("--").replace("-", "_"): value for flag, value in TINY_RUN.items()}
    numbers = {name: int(value) for name, value in tiny.items() if value.isdigit()}
    return TrainConfig(**tiny | numbers | {"warmup_epochs": 1.0} | options)


def make_step(**options):
    """A fresh state and the recipe of its steps, on the CPU in float32."""
    config, machine = tiny_config(**options), Machine(World(), torch.device("cpu"), "off")
    return make_parts(config, machine)


def make_parts(config: TrainConfig, machine: Machine):
    """A fresh state and the recipe of its steps."""
    state, _ = build_state(config, num_classes=NUM_CLASSES, machine=machine)
    recipe = build_recipe(
        config,
        state,
        num_classes=NUM_CLASSES,
        machine=machine,
        preprocessing=Preprocessing(config.image_size),
    )
    return state, recipe


def make_batch(seed: int, *, batch_size: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), generator=rng)
    return Batch(images, labels, torch.ones(batch_size, dtype=torch.bool), [])


def cut(batch: Batch, num_parts: int) -> list[Batch]:
    return [Batch(*tensors, []) for tensors in zip(*(t.chunk(num_parts) for t in batch[:3]))]


def test_a_step_sets_the_training_mode_once_and_again_after_an_evaluation(monkeypatch):
    """To walk over all modules at every step would cost the host 1.6 ms (convnext_base)."""
    state, recipe = make_step()
    modes, train_mode = [], nn.Module.train

    def noted(module, mode=True):
        if module is state.model:
            modes.append(mode)
        return train_mode(module, mode)

    monkeypatch.setattr(nn.Module, "train", noted)
    for _ in range(2):
        state.model.eval()
        for _ in range(3):
            train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
            assert all(module.training for module in state.model.modules())

    assert modes == [False, True] * 2


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_to_the_norm_asked_for(limit):
    """0 is no limit. Compared is the first moment, after one step a tenth of the gradient; the
    norm that is logged is that before clipping."""
    state, recipe = make_step(clip_grad_norm=limit)

    train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)

    moments = torch.cat([s["exp_avg"].flatten() for s in state.optimizer.state.values()])
    norm = state.sums.read().grad_norm
    assert norm > 0.1
    clipped = min(norm, limit or math.inf)
    assert moments.norm().item() == pytest.approx(0.1 * clipped, rel=1e-3)


def test_accumulated_batches_equal_one_large_batch():
    """One clip, one update. Compared are loss, gradient norm and first moment, a tenth of the
    clipped gradient: an update divides by the gradient's size, and so by its rounding."""
    large, recipe = make_step(**NO_MIXING)
    small, _ = make_step(**NO_MIXING)
    batch = make_batch(0, batch_size=16)

    loss = train_step(large, [batch], lr=1e-3, recipe=recipe)
    recipe = replace(recipe, forward=small.model)
    loss_of_parts = train_step(small, cut(batch, 4), lr=1e-3, recipe=recipe)

    torch.testing.assert_close(loss_of_parts, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(small.sums.interval, large.sums.interval, rtol=1e-5, atol=0)
    moments = [
        torch.cat([s["exp_avg"].flatten() for s in state.optimizer.state.values()])
        for state in (large, small)
    ]
    assert (moments[1] - moments[0]).abs().max() < 1e-5 * moments[0].abs().max()
    assert large.sums.read().grad_norm > recipe.clip_grad_norm  # so clipping twice would show
    assert small.step == large.step == 1


@pytest.fixture
def two_ranks():
    """What the first of two ranks is given; the group behind it is of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Machine(World(0, 2), torch.device("cpu"), "off")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_exchange_gradients_once_per_step(two_ranks, accumulate):
    """DDP is asked to hold back all but the last of the batches that make a step."""
    config = tiny_config(accumulate=accumulate)
    state, recipe = make_parts(config, two_ranks)
    steps_of_buckets = []

    def note(_, bucket):
        steps_of_buckets.append((state.step, bucket.index()))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    recipe.forward.register_comm_hook(None, note)

    for _ in range(3):
        train_step(state, cut(make_batch(0, batch_size=12), accumulate), lr=1e-3, recipe=recipe)

    assert {step for step, _ in steps_of_buckets} == {0, 1, 2}
    assert len(set(steps_of_buckets)) == len(steps_of_buckets)


def test_adamp_is_given_the_average_that_it_moves_along_on_cuda():
    """The one that the run validates; without an average there is none."""
    averaged, plain = make_step(ema_decay=0.9)[0], make_step()[0]

    assert averaged.average is not None
    assert averaged.optimizer.average is averaged.average
    assert plain.optimizer.average is plain.average is None


@pytest.mark.bits
def test_our_adamp_gives_the_learning_curve_of_timms(shards, one_thread):
    """Forty whole steps on real images, mixing and stochastic depth on: the same losses."""
    train_data = open_dataset(str(shards / "train.json"))
    stream = ShardStream(
        train_data,
        TrainOrder(train_data.sizes, **ORDER),
        batch_size=8,
        transform=TrainTransform(32),
    )
    batches = list(itertools.islice(stream, 40))
    ours, recipe = make_step()
    timms, recipe_of_timms = make_step()
    groups = parameter_groups(timms.model, weight_decay=0.05)
    timms.optimizer = TimmAdamP(groups, lr=1e-3)
    keep_lr_on_device(timms.optimizer, torch.device("cpu"))

    losses = [train_step(ours, [batch], lr=1e-2, recipe=recipe) for batch in batches]
    of_timms = [train_step(timms, [batch], lr=1e-2, recipe=recipe_of_timms) for batch in batches]

    assert losses == of_timms
    assert torch.stack(losses).std() > 0.01


def run_config(shards, tmp_path, **options) -> TrainConfig:
    return tiny_config(shards=str(shards / "train.json"), out=str(tmp_path / "run"), **options)


def test_the_average_is_what_is_validated(shards, tmp_path):
    """The loss that a run logs after its last step is that of `eval` with the averaged weights."""
    config = run_config(shards, tmp_path, epochs=1, ema_decay=0.9)
    train(config)
    checkpoint = tmp_path / "run" / "last.pt"
    of_eval = EvalConfig(checkpoint=str(checkpoint), device="cpu", batch_size=8, workers=0)

    result, about = evaluate_checkpoint(of_eval)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    [logged] = [json.loads(line)["val/loss"] for line in lines if "val/loss" in line]
    weights = load_checkpoint(checkpoint)
    assert about["weights"] == "ema" and about["step"] == 7
    assert logged == pytest.approx(result.loss, rel=1e-6)
    assert any(not torch.equal(value, weights["model"][k]) for k, value in weights["ema"].items())


def test_every_step_uses_the_learning_rate_of_the_formula(shards, tmp_path, monkeypatch):
    """The optimizer's own value at each step of a run, over warm-up and cosine, to its last."""
    used = []

    def recorded(state, batches, **how):
        loss = train_step(state, batches, **how)
        used.append(state.optimizer.param_groups[1]["lr"].item())
        return loss

    monkeypatch.setattr(loop, "train_step", recorded)
    train(run_config(shards, tmp_path, lr=1e-2, min_lr=1e-5, warmup_lr=1e-4))

    expected = [
        lr_at(step, lr=1e-2, total_steps=25, warmup_steps=6, warmup_lr=1e-4, min_lr=1e-5)
        for step in range(25)
    ]
    assert used == expected
    assert used[0] == 1e-4 and used[6] == 1e-2 and used[-1] == 1e-5


@pytest.mark.parametrize(
    ("rule", "peak"),
    [("none", 4e-3), ("linear", 4e-3 * 8 / 4096), ("sqrt", 4e-3 * (8 / 4096) ** 0.5)],
)
def test_the_peak_learning_rate_follows_the_batch_by_the_rule_that_is_asked_for(
    shards, tmp_path, capsys, rule, peak
):
    """The peak is scaled, both ends are not; without a rule, a warning gives both values."""
    used = run_config(shards, tmp_path, scale_lr=rule, max_steps=1)

    rate = lr_schedule(used, TrainOrder(np.array([50]), **ORDER))
    train(used)

    assert rate(6) == pytest.approx(peak)
    assert (rate(0), rate(24)) == (used.warmup_lr, used.min_lr)
    warning = capsys.readouterr().err
    if rule == "none":
        assert "7.81e-06" in warning and "1.77e-04" in warning and "4096" in warning
    else:
        assert warning == ""


def test_a_learning_rate_of_ones_own_is_not_warned_about(shards, tmp_path, capsys):
    """What --lr 1e-3 was chosen for, nobody but the user knows."""
    train(run_config(shards, tmp_path, lr=1e-3, max_steps=1))

    assert capsys.readouterr().err == ""
