"""Optimizers next to AdamP: timm's, skipped by a flag, resumed bit for bit or refused."""

import copy

import pytest
import torch
from conftest import run, train_command
from test_resume import assert_same
from timm.optim import create_optimizer_v2
from torch import nn

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.optimizer import (
    build_optimizer,
    set_lr,
    step_and_undo,
    step_unless,
)

OTHERS = ["adamw", "sgd", "lion", "muon"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    # No bias before the norm: its gradient is rounding alone, of which Adam makes whole steps.
    conv = nn.Conv2d(3, 8, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8))


def take_step(model, optimizer, *, seed: int, skip: bool = False, step=step_unless) -> None:
    rng = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, 4, 4, generator=rng)).square().sum().backward()
    if skip:
        for p in model.parameters():
            p.grad.fill_(torch.nan)
    set_lr(optimizer, 0.01)
    step(optimizer, torch.tensor(skip))
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OTHERS)
def test_steps_are_those_of_timms_factory(name):
    """Its groups and defaults; within a rounding, since fused kernels round less often."""
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, TrainConfig(optimizer=name, lr=0.01, weight_decay=0.1))
    reference = create_optimizer_v2(theirs, opt=name, lr=0.01, weight_decay=0.1)

    for seed in range(5):
        take_step(ours, optimizer, seed=seed)
        take_step(theirs, reference, seed=seed)

    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours[3].weight, small_model()[3].weight)


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize(
    ("name", "step"),
    [*((name, step_unless) for name in ("adamp", *OTHERS))]
    + [*((name, step_and_undo) for name in ("lion", "muon"))],
)
def test_a_skipped_step_leaves_no_trace(name, step, when):
    """Not in weights, nor in moments, nor in step counts: the next are as if it had not been."""
    config = TrainConfig(optimizer=name, lr=0.01)
    ours, others = small_model(), small_model()
    optimizer, reference = build_optimizer(ours, config), build_optimizer(others, config)

    for seed in range(3):
        if (seed == 0) == (when == "first"):
            buffers = copy.deepcopy(dict(ours.named_buffers()))
            take_step(ours, optimizer, seed=99, skip=True, step=step)
            ours.load_state_dict(buffers, strict=False)  # BatchNorm's are the forward pass's
        take_step(ours, optimizer, seed=seed, step=step)
        take_step(others, reference, seed=seed)

    assert_same(ours.state_dict(), others.state_dict())
    assert_same(optimizer.state_dict()["state"], reference.state_dict()["state"])


def test_momentum_changes_the_steps_of_those_that_have_it():
    for name in ("sgd", "muon"):
        weights = []
        for momentum in (None, 0.9, 0.0):
            model = small_model()
            optimizer = build_optimizer(model, TrainConfig(optimizer=name, momentum=momentum))
            for seed in range(2):
                take_step(model, optimizer, seed=seed)
            weights.append(model[3].weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])


def test_momentum_is_refused_where_there_is_none():
    with pytest.raises(UsageError, match="--momentum 0.5: --optimizer adamp"):
        TrainConfig(momentum=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_resumed_run_is_the_uninterrupted_one(shards, tmp_path, name):
    """With layer decay and a head's own rate, whose groups the checkpoint numbers."""
    options = {"--optimizer": name, "--layer-decay": 0.8, "--head-lr": 0.003, "--epochs": 2}
    straight, stopped = (
        train_command(shards, tmp_path / out, **options) for out in ("straight", "stopped")
    )
    run(straight)
    run(stopped + ["--max-steps", "5"])
    run(stopped + ["--resume"])
    other = run(stopped + ["--resume", "--optimizer", "adamp"], check=False)

    one, two = (load_checkpoint(tmp_path / out / "last.pt") for out in ("straight", "stopped"))
    for part in ("model", "optimizer", "sums", "step"):
        assert_same(one[part], two[part], part)
    assert other.returncode == 2
    assert f"--optimizer {name}, this run adamp" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1
    assert one["step"] == 13
