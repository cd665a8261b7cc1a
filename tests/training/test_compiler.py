"""--compile: each image size once, as one graph; what computes something else is noticed."""

import contextlib
import math
from dataclasses import replace

import pytest
import timm
import torch
from test_train import NO_MIXING, NUM_CLASSES, make_batch, make_step, run_config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from wds_convnext.errors import TrainingError
from wds_convnext.training import loop
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.compiler import compile_model
from wds_convnext.training.model import create_model
from wds_convnext.training.step import step_loss, train_step
from wds_convnext.training.train import train


@pytest.mark.slow
def test_each_image_size_is_compiled_once_before_the_first_step(
    shards, tmp_path, capsys, monkeypatch
):
    """Two for training and one for evaluation, though batches straddle epochs, the last of an
    evaluation is padded, mixing changes from step to step, and an average is swapped in; none is
    cut, also under autocast, where blocks hand on half precision."""
    counter = CompileCounterWithBackend("eager")
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, *, dynamic, **_: compile(model, backend=counter, dynamic=dynamic),
    )
    graphs = []

    def recorded(state, batches, **how):
        loss = train_step(state, batches, **how)
        graphs.append(counter.frame_count)
        return loss

    monkeypatch.setattr(loop, "train_step", recorded)
    lasting = {"epochs": 2, "val_every": 1, "ema_decay": 0.9}
    sizes = {"image_size": 48, "image_size_schedule": "0:32,0.5:48"}
    train(run_config(shards, tmp_path, compile=True, amp="bf16", **sizes, **lasting))

    assert "compiler cut" not in capsys.readouterr().out
    assert graphs[0] == 3
    assert counter.frame_count == 3
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert saved.keys() == timm.create_model("test_convnext").state_dict().keys()


class Scaled(nn.Module):
    """A model whose logits come out multiplied."""

    def __init__(self, model: nn.Module, factor: float):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images):
        return self.factor * self.model(images)


@pytest.mark.parametrize(("factor", "is_wrong"), [(1.0, False), (30.0, True), (math.nan, True)])
def test_a_compiled_model_that_computes_something_else_is_noticed(
    shards, tmp_path, capsys, monkeypatch, factor, is_wrong
):
    """Logits of another size, or NaN, on the first batch; a faithful one is not warned about. Also
    where a fresh classifier's logits are 0 whatever comes before it, and it is left at 0."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: Scaled(model, factor))
    weights = create_model("test_convnext", num_classes=NUM_CLASSES + 1).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    for options in ({}, {"init_from": str(tmp_path / "weights.pth")}):
        config = run_config(shards, tmp_path, compile=True, max_steps=1, overwrite=True, **options)
        with contextlib.suppress(TrainingError):  # NaN ends the run as well
            train(config)

        assert ("Do not trust this run" in capsys.readouterr().out) == is_wrong


def in_two(logits: torch.Tensor) -> torch.Tensor:
    """What the compiler makes two graphs of."""
    logits = logits + 0
    torch._dynamo.graph_break()
    return logits + 0


class CutAtTheEnd(nn.Module):
    """A model of which the compiler gets the last operations alone, so that it is quick."""

    def __init__(self, model: nn.Module, compile):
        super().__init__()
        self.model, self.last = model, compile(in_two, backend="eager")

    def forward(self, images):
        return self.last(self.model(images))


def test_a_model_that_the_compiler_cuts_is_noticed(shards, tmp_path, capsys, monkeypatch):
    """Nothing would fail: it would only be slower."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: CutAtTheEnd(model, compile))
    train(run_config(shards, tmp_path, compile=True, max_steps=1))

    assert "the compiler cut the model into several graphs" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_compiler_agrees_with_eager_also_on_dropped_paths():
    """inductor, stochastic depth on, LayerScale at 1 so that blocks count: with the same seed the
    same paths are dropped and the loss is the same; with another seed it is not."""
    few_blocks = {"model_arg": ("depths=(1,1,1,1)",)}  # fewer kernels for the C++ compiler
    state, recipe = make_step(**NO_MIXING | {"drop_path_rate": 0.5} | few_blocks)
    for name, parameter in state.model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1.0)
    recipe = replace(recipe, forward=compile_model(state.model))
    batches = [make_batch(0)]

    of_another_seed = step_loss(state, batches, replace(recipe, seed=1), compiled=False)
    eager = step_loss(state, batches, recipe, compiled=False)
    compiled = step_loss(state, batches, recipe, compiled=True)
    loss = train_step(state, batches, lr=1e-3, recipe=recipe)

    assert torch.equal(loss, compiled)
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    assert abs(of_another_seed - eager) > 1e-3
