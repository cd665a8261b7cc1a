"""AdamP's state is timm's: it continues in either, and in a copy, and no step count is lost."""

import copy
import pickle

import pytest
import torch
from test_adamp import GRADIENTS, SHAPES, clones, random_params, train
from timm.optim import AdamP as TimmAdamP

from wds_convnext.training.adamp import AdamP

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.bits
@pytest.mark.parametrize("option", ["nesterov", "caution"])
@pytest.mark.parametrize("source", [AdamP, TimmAdamP])
@pytest.mark.parametrize("target", [AdamP, TimmAdamP])
def test_state_dict_continues_in_either_optimizer(source, target, option):
    """A run that changes hands in the middle ends in the bits of timm's whole run."""
    params = random_params(SHAPES)
    whole = TimmAdamP(clones(params), lr=4e-3, weight_decay=0.05, **{option: True})
    first = source(params, lr=4e-3, weight_decay=0.05, **{option: True})

    train([first, whole], list(GRADIENTS), seed=1, missing=0.3)
    second = target(clones(params))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train([second, whole], list(GRADIENTS), seed=2)

    ours, timms = second.state_dict(), whole.state_dict()
    assert ours["param_groups"] == timms["param_groups"]
    for i, state in timms["state"].items():
        assert type(ours["state"][i]["step"]) is int
        assert all(
            torch.equal(*map(torch.as_tensor, (ours["state"][i][k], state[k]))) for k in state
        )
    for p, q in zip(second.param_groups[0]["params"], whole.param_groups[0]["params"]):
        assert torch.equal(p, q)


@pytest.mark.bits
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue(copied):
    """A deep copy and a pickle bring their own parameters, and go on where the original was."""
    optimizer = AdamP(random_params(SHAPES), weight_decay=0.05)
    train([optimizer], ["random", "parallel"])

    twin = copied(optimizer)
    train([optimizer, twin], ["random", "orthogonal to the rows"])

    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"]):
        assert p is not q
        assert torch.equal(p, q)
        assert twin.state[q]["step"] == 4


def test_state_dict_leaves_the_optimizer_as_it_is():
    """Step counts stay tensors in the optimizer when the dict is given ints."""
    (p,) = random_params([(3, 5)])
    optimizer = AdamP([p])
    train([optimizer], ["random"])

    optimizer.state_dict()

    assert isinstance(optimizer.state[p]["step"], torch.Tensor)


@pytest.mark.parametrize("step", [5, torch.tensor(5.0), torch.tensor(5)])
def test_loads_step_counts_of_any_kind(step):
    """timm writes ints, torch's optimizers float tensors."""
    (p,) = random_params([(3, 5)])
    moments = {"exp_avg": torch.zeros(3, 5), "exp_avg_sq": torch.zeros(3, 5)}
    optimizer = AdamP([p])
    state_dict = optimizer.state_dict() | {"state": {0: {"step": step, **moments}}}

    optimizer.load_state_dict(state_dict)
    train([optimizer], ["random"])

    assert optimizer.state_dict()["state"][0]["step"] == 6


def test_loads_state_dicts_of_before_caution():
    """timm's, until it had that argument, lack it; it is then off, as it was."""
    (p,) = random_params([(3, 5)])
    optimizer = AdamP([p])
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][0]["caution"]

    optimizer.load_state_dict(state_dict)
    train([optimizer], ["random"])

    assert optimizer.param_groups[0]["caution"] is False
