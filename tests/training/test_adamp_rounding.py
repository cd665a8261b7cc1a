"""How AdamP rounds: in stacks, on many threads, in float64, late in a run."""

import pytest
import torch
from test_adamp import GRADIENTS, SHAPES, assert_same_bits, clones, random_params, train
from timm.optim import AdamP as TimmAdamP

from wds_convnext.training import adamp
from wds_convnext.training.adamp import AdamP

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.bits
@pytest.mark.parametrize("limit", [1, 100, 2**30])
def test_the_size_of_stacks_changes_no_bit(limit, monkeypatch):
    """Tensors of one shape may be updated one by one, a few, or all at a time."""
    monkeypatch.setattr(adamp, "MAX_STACK", {"cpu": limit})
    monkeypatch.setattr(adamp, "HOST_DEVICES", ())
    params = random_params([(3, 5)] * 9 + [(7,)] * 9)
    ours = AdamP(params, weight_decay=0.05)
    timms = TimmAdamP(clones(params), weight_decay=0.05)

    train([ours, timms], list(GRADIENTS), missing=0.2)

    assert_same_bits(ours, timms)


def test_many_threads_differ_from_timm_by_rounding():
    """Threads split sums; the difference stays below 1e-6 of the largest update."""
    torch.set_num_threads(2)
    params = random_params([(256, 256)] * 3 + [(512, 300)])
    before = clones(params)
    ours, timms = AdamP(params, lr=1e-3), TimmAdamP(clones(params), lr=1e-3)

    train([ours, timms], ["orthogonal to the whole"])

    for start, p, q in zip(before, params, timms.param_groups[0]["params"]):
        assert (p - q).abs().max() <= 1e-6 * (q - start).abs().max()


@pytest.mark.bits
def test_error_against_float64():
    """Both of our precisions are off by their rounding alone; the moments not even by that.

    For float32 this is, per step, half an ulp of the parameter (6e-8 of it) and 1e-6 of the update.
    """
    singles = random_params(SHAPES)
    doubles = [p.detach().double().requires_grad_() for p in singles]
    single, exact = AdamP(singles, lr=1e-3), AdamP(doubles, lr=1e-3)
    timms = TimmAdamP(clones(doubles), lr=1e-3)
    exact.found_inf = torch.zeros(())
    largest_update = 0.0

    for step in range(40):
        start = clones(doubles)
        train([single, exact, timms], ["random" if step % 2 else "parallel"], seed=step)
        updates = [(p - q).abs().max().item() for p, q in zip(doubles, start)]
        largest_update = max(largest_update, *updates)

    for p, q in zip(doubles, timms.param_groups[0]["params"]):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(exact.state[p][name], timms.state[q][name]), (name, p.shape)
        # Per step: a square root that is one unit in the last place off moves the update by at
        # most two of its units, as the quotient rounds too, and the rounding of the parameter by
        # one of the parameter's. Measured on AMD Zen 3: 1 % of this bound; one such step in 40.
        assert (p - q).abs().max() <= 40 * 2**-52 * (2 * largest_update + q.abs().max())
    for p, q in zip(singles, doubles):
        assert (p - q).abs().max() <= 40 * (6e-8 * q.abs().max() + 1e-6 * 1e-3)


@pytest.mark.bits
@pytest.mark.parametrize("steps_before", [9, 999, 123_456, 10**7])
def test_late_steps_give_timms_bits(steps_before):
    """The bias corrections are exact enough for as long as a run may be."""
    params = random_params(SHAPES)
    optimizers = AdamP(params), TimmAdamP(clones(params))
    train(optimizers, ["random"])
    for optimizer in optimizers:
        state_dict = optimizer.state_dict()
        for state in state_dict["state"].values():
            state["step"] = steps_before
        optimizer.load_state_dict(state_dict)

    train(optimizers, ["random"] * 5, seed=1)

    assert_same_bits(*optimizers)


@pytest.mark.bits
def test_float_and_tensor_learning_rates_agree():
    """A 0-d tensor gives the bits of the float, also when both change between steps."""
    params = random_params(SHAPES)
    floats = AdamP(params, weight_decay=0.05)
    tensors = AdamP(clones(params), lr=torch.tensor(0.0, dtype=torch.float64), weight_decay=0.05)

    for lr in (1e-3, 4e-3, 1e-7):
        floats.param_groups[0]["lr"] = lr
        tensors.param_groups[0]["lr"].fill_(lr)
        train([floats, tensors], ["random", "orthogonal to the rows"])

    for p, q in zip(params, tensors.param_groups[0]["params"]):
        assert torch.equal(p, q)
