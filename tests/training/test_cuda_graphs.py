"""--cuda-graphs: where it is refused, and where what was replayed may be overwritten."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_train import NUM_CLASSES, make_batch, make_step

from wds_convnext.errors import UsageError
from wds_convnext.training.compiler import replayed_model
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.evaluate import evaluate_batches
from wds_convnext.training.step import train_step


@pytest.mark.parametrize(
    ("device", "compile", "world", "found"),
    [
        ("cpu", True, World(), "on a GPU, found cpu"),
        ("cuda:0", False, World(), "with --compile, found --no-compile"),
        ("cuda:0", True, World(0, 2), "in one process, found 2"),
    ],
    ids=["cpu", "not compiled", "two ranks"],
)
def test_cuda_graphs_are_refused_where_there_can_be_none(device, compile, world, found):
    """In one line, before anything is made."""
    with pytest.raises(UsageError, match=f"^--cuda-graphs: only {found}. Leave it out.$"):
        Machine.of(world, torch.device(device), amp="off", compile=compile, cuda_graphs=True)


def test_a_training_step_and_each_batch_of_an_evaluation_are_marked(monkeypatch):
    """A step of two batches begins once, so that the second finds the gradients of the first."""
    begun, options = [], []
    compile = torch.compile

    def compiled(model, *, dynamic, **how):
        options.append(how["options"])
        return compile(model, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    state, recipe = make_step()
    recipe = replace(recipe, forward=replayed_model(state.model), cuda_graphs=True)

    train_step(state, [make_batch(0), make_batch(1)], lr=1e-3, recipe=recipe)
    begun_by_step = len(begun)
    evaluate_batches(
        recipe.forward,
        [make_batch(2)] * 3,
        num_classes=NUM_CLASSES,
        normalizer=recipe.normalizer,
        autocast=nullcontext,
        world=World(),
    )

    assert begun_by_step == 1
    assert len(begun) == 1 + 3
    assert options == [{"fallback_random": True, "triton.cudagraphs": True}]
